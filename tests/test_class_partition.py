"""A teacher of other classes: what heads see of both networks, with numbers that a reader can check."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

from kd_det import Batch
from kd_det.class_partition import ClassPartition
from kd_det.heads import BornAgainHead, BoxTargetHead, SoftTargetHead

BATCH = Batch([], [(8, 8)])
LOG3 = math.log(3)
# Student and teacher, whose softmax over boxes ends with the background.
SUPERSET = ClassPartition(("a", "b"), ("x", "b", "y", "a"))
SUBSET = ClassPartition(("x", "b", "y", "a"), ("a", "b"))
PERMUTED = ClassPartition(("a", "b", "c"), ("c", "a", "b"))
NEW = ClassPartition(("old", "new1", "new2", "new3"), ("old",))


def logs(*rows, **options):
    """Logits whose softmax are these rows of probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_(**options)


def compare(head, classes, student, teacher):
    (loss,) = head(*classes.align(student, teacher, "shared"), BATCH).values()
    return loss


def kl(teacher, student):
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))


def boxes(logits, *classes):
    return {"roi_logits": logits, "roi_classes": torch.tensor(classes)}


# ---- Classes of boxes ----
def test_teacher_that_knows_more():
    """Its x and y, 0.1 each, and its background of 0.2 are everything else: 0.4 against the student's 0.5."""
    student, teacher = boxes(logs([0.2, 0.3, 0.5]), 0), {"roi_logits": logs([0.1, 0.2, 0.1, 0.4, 0.2])}
    loss = compare(SoftTargetHead(), SUPERSET, student, teacher)
    assert loss.item() == pytest.approx(kl([0.4, 0.2, 0.4], [0.2, 0.3, 0.5]))


def test_teacher_that_knows_less():
    """The order is the student's: b before a. Its x, y and background, 0.1, 0.1 and 0.2, are everything else."""
    student, teacher = boxes(logs([0.1, 0.2, 0.1, 0.4, 0.2]), 1), {"roi_logits": logs([0.2, 0.3, 0.5])}
    mapped, _ = SUBSET.align(student, teacher, "shared")
    torch.testing.assert_close(mapped["roi_logits"].softmax(1)[0].tolist(), [0.2, 0.4, 0.4])
    loss = compare(SoftTargetHead(), SUBSET, student, teacher)
    assert loss.item() == pytest.approx(kl([0.3, 0.2, 0.5], [0.2, 0.4, 0.4]))


def test_teacher_that_knows_the_same_in_another_order():
    """The loss is that of a teacher in the student's order, to the last digit."""
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    own = boxes(student, 0, 1, 2, 3, 3)
    loss = compare(SoftTargetHead(), PERMUTED, own, {"roi_logits": teacher})
    (ordered,) = SoftTargetHead()(own, {"roi_logits": teacher[:, [1, 2, 0, 3]]}, BATCH).values()
    assert loss.item() == ordered.item() > 0


def test_student_is_taught_the_old_classes_and_free_on_the_new_ones():
    """Everything else has 0.8 of the student and 0.3 of the teacher.

    The gradient with respect to a logit of it is the logit's share of the 0.8, times 0.8 - 0.3; that of the old class
    is 0.2 - 0.7. So new classes and background, 0.1 each and 0.5, fall alike, and their shares stay what they are.
    """
    logits = logs([0.2, 0.1, 0.1, 0.1, 0.5], requires_grad=True)
    loss = compare(SoftTargetHead(), NEW, boxes(logits, 0), {"roi_logits": logs([0.7, 0.3])})
    assert loss.item() == pytest.approx(kl([0.7, 0.3], [0.2, 0.8]))
    loss.backward()
    torch.testing.assert_close(logits.grad[0].tolist(), [-0.5, 0.0625, 0.0625, 0.0625, 0.3125])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 3.0},
        {"standardize": True},
        {"adjust": "probability_shift"},
        {"dynamic_temperature": "flsw"},
        *({"divergence": divergence} for divergence in ("dkd", "nkd", "dist")),
        {"divergence": "gdkd", "top_k": 1},
    ],
    ids=str,
)
def test_no_divergence_depends_on_how_new_classes_and_background_share(options):
    """One of the two boxes is labelled as a new class. Both students give the old class 0.2 and 0.5."""
    head, teacher = SoftTargetHead(**options), {"roi_logits": logs([0.7, 0.3], [0.4, 0.6])}
    losses = [
        compare(head, NEW, boxes(logs([0.2, *first], [0.5, *second]), 0, 2), teacher).item()
        for first, second in (
            ((0.1, 0.1, 0.1, 0.5), (0.1, 0.1, 0.1, 0.2)),
            ((0.4, 0.2, 0.1, 0.1), (0.01, 0.4, 0.04, 0.05)),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_box_of_a_new_class_is_labelled_as_everything_else():
    """DKD: everything else of 0.3 against 0.8, and the old class alone among the others; NKD: -0.3 log 0.8."""
    student, teacher = boxes(logs([0.2, 0.1, 0.1, 0.1, 0.5]), 3), {"roi_logits": logs([0.7, 0.3])}
    assert NEW.align(student, teacher, "shared")[0]["roi_classes"].tolist() == [1]
    dkd = compare(SoftTargetHead(divergence="dkd"), NEW, student, teacher)
    assert dkd.item() == pytest.approx(kl([0.7, 0.3], [0.2, 0.8]))
    nkd = compare(SoftTargetHead(divergence="nkd"), NEW, student, teacher)
    assert nkd.item() == pytest.approx(-0.3 * math.log(0.8))
    # The teacher is not corrected there, and the box is not among the objects.
    adjusted = compare(SoftTargetHead(adjust="probability_shift"), NEW, student, teacher)
    assert adjusted.item() == pytest.approx(dkd.item())
    assert compare(SoftTargetHead(rois="foreground"), NEW, student, teacher).item() == 0


def test_half_precision_is_cast_up():
    student, teacher = boxes(torch.zeros(1, 5, dtype=torch.float16), 0), {"roi_logits": torch.zeros(1, 2).bfloat16()}
    sides = NEW.align(student, teacher, "shared")
    assert [x["roi_logits"].dtype for x in sides] == [torch.float32] * 2


# ---- Anchors, masks and boxes ----
def test_dense_logits_and_their_labels():
    """The new classes are not compared; the old class's labels stay, and so do ignored anchors."""
    student = {"dense_logits": torch.tensor([[[0.0, 7.0, -7.0, 7.0]]]), "dense_labels": torch.tensor([[0, 2, 4, -1]])}
    sides = NEW.align(student, {"dense_logits": torch.tensor([[[LOG3]]])}, "shared")
    assert [x["dense_logits"].tolist() for x in sides] == [[[[0.0]]], [[[pytest.approx(LOG3)]]]]
    assert sides[0]["dense_labels"].tolist() == [[0, 1, 1, -1]]
    loss = compare(SoftTargetHead(sources=["dense"]), NEW, student, {"dense_logits": torch.tensor([[[LOG3]]])})
    assert loss.item() == pytest.approx(kl([0.75, 0.25], [0.5, 0.5]))


@pytest.mark.parametrize("agnostic", [False, True])
def test_masks_of_shared_classes_only(agnostic):
    """Boxes of y, a and b: the first has no mask to compare. a is the teacher's first class, b its second."""
    student = torch.zeros(3, 1 if agnostic else 4, 1, 1)
    teacher = torch.full((3, 1 if agnostic else 2, 1, 1), 9.0)
    teacher[1, 0], teacher[2, -1] = LOG3, 0.0
    own = {"mask_logits": student, "mask_classes": torch.tensor([2, 3, 1]), "mask_boxes": torch.arange(15.0).view(3, 5)}
    mapped, _ = SUBSET.align(own, {"mask_logits": teacher}, "shared")
    assert mapped["mask_classes"].tolist() == [1, 0]
    assert torch.equal(mapped["mask_boxes"], own["mask_boxes"][1:])
    loss = compare(SoftTargetHead(sources=["mask"]), SUBSET, own, {"mask_logits": teacher})
    assert loss.item() == pytest.approx(kl([0.75, 0.25], [0.5, 0.5]) / 2)


@pytest.mark.parametrize("agnostic", [False, True])
def test_deltas_of_shared_classes_only(agnostic):
    """Box 0 of class a is off by (0.5, 0, 0, 0), whose smooth L1 is 0.125; box 1 of y does not count."""
    student, teacher = torch.zeros(2, 4 if agnostic else 16), torch.full((2, 4 if agnostic else 8), 9.0)
    teacher[0, :4] = torch.tensor([0.5, 0, 0, 0])
    own = boxes(torch.zeros(2, 5), 3, 2) | {"roi_deltas": student}
    loss = compare(BoxTargetHead(), SUBSET, own, {"roi_logits": torch.zeros(2, 3), "roi_deltas": teacher})
    assert loss.item() == pytest.approx(0.125 / 4)


# ---- Images ----
def images(logits, *labels):
    return {"logits": logits, "labels": torch.tensor(labels)}


@pytest.mark.parametrize(
    ("classes", "student", "teacher"),
    [
        (SUPERSET, [0.25, 0.75], [0.1, 0.3, 0.1, 0.5]),
        (ClassPartition(("b", "a", "x"), ("a", "b")), [0.375, 0.125, 0.5], [0.625, 0.375]),
    ],
    ids=["superset", "new classes"],
)
def test_softmax_over_shared_classes_where_one_network_knows_no_others(classes, student, teacher):
    """Among a and b the student has 1/4 and 3/4, and the teacher 5/8 and 3/8."""
    logits = logs(student, requires_grad=True)
    loss = compare(SoftTargetHead(sources=["cls"]), classes, images(logits, 0), {"logits": logs(teacher)})
    assert loss.item() == pytest.approx(kl([0.625, 0.375], [0.25, 0.75]))
    loss.backward()
    assert logits.grad[0, 2:].tolist() == [0.0] * (len(student) - 2)


def test_everything_else_of_images_where_both_know_others():
    classes = ClassPartition(("a", "cow"), ("dog", "a", "cat"))
    student, teacher = images(logs([0.4, 0.6]), 1), {"logits": logs([0.1, 0.7, 0.2])}
    mapped, _ = classes.align(student, teacher, "shared")
    assert mapped["labels"].tolist() == [1]
    loss = compare(SoftTargetHead(sources=["cls"]), classes, student, teacher)
    assert loss.item() == pytest.approx(kl([0.7, 0.3], [0.4, 0.6]))


def test_born_again_by_names():
    """The cross-entropy with 0.4, 0.2 and 0.4 of the student's 0.2, 0.3 and 0.5."""
    student, teacher = boxes(logs([0.2, 0.3, 0.5]), 0), {"roi_logits": logs([0.1, 0.2, 0.1, 0.4, 0.2])}
    expected = -sum(p * math.log(q) for p, q in zip([0.4, 0.2, 0.4], [0.2, 0.3, 0.5], strict=True))
    assert compare(BornAgainHead(), SUPERSET, student, teacher).item() == pytest.approx(expected)


# ---- Heads that use the teacher's own layers ----
def test_teachers_classes_with_the_students_labels():
    """y and x are not the teacher's: their labels become that of its background, 2."""
    student = boxes(torch.zeros(5, 5), 0, 1, 2, 3, 4) | {"dense_labels": torch.tensor([[3, 0, -1, 4]])}
    teacher = {"roi_logits": torch.ones(5, 3)}
    mapped, others = SUBSET.align(student, teacher, "teacher")
    assert mapped["roi_classes"].tolist() == [2, 1, 2, 0, 2]
    assert mapped["dense_labels"].tolist() == [[0, 2, -1, 2]]
    assert others["roi_logits"] is teacher["roi_logits"]


@pytest.mark.parametrize(
    ("student", "teacher", "view"),
    [
        (("p3", "roi_features", "rpn_logits", "keypoint_logits"), ("p3",), None),
        (("roi_box_features",), ("roi_box_features", "roi_logits", "roi_logits_weight"), "teacher"),
        (("p3", "mask_logits"), ("p3", "mask_logits"), "shared"),
    ],
)
def test_view_follows_from_the_signals_of_a_head(student, teacher, view):
    assert SUBSET.view(student, teacher) == view


def test_shapes_after_the_mapping():
    spec = {"roi_logits": 5, "roi_deltas": 16, "mask_logits": 4, "dense_logits": 4, "logits": 4, "p3": 7}
    agnostic = {"roi_logits": 3, "roi_deltas": 4, "mask_logits": 1, "logits": 2}
    specs = ({name: ShapeSpec(channels=n) for name, n in x.items()} for x in (spec, agnostic))
    student, teacher = ({name: x.channels for name, x in y.items()} for y in SUBSET.align_specs(*specs))
    assert student == {"roi_logits": 3, "roi_deltas": 8, "mask_logits": 2, "dense_logits": 2, "logits": 2, "p3": 7}
    assert teacher == agnostic


# ---- Predictions ----
def test_predictions_are_translated_to_the_students_indices():
    found = Instances((8, 8), pred_boxes=Boxes(torch.zeros(3, 4)), pred_classes=torch.tensor([3, 0, 1]))
    (output,) = SUPERSET.translate([{"instances": found, "scores": torch.tensor([0.1, 0.2, 0.3, 0.4])}])
    assert output["instances"].pred_classes.tolist() == [0, 1]
    assert output["scores"].tolist() == [pytest.approx(0.4), pytest.approx(0.2)]
    (scores,) = SUBSET.translate([{"scores": torch.tensor([0.3, 0.7])}])
    assert scores["scores"].tolist() == [-math.inf, pytest.approx(0.7), -math.inf, pytest.approx(0.3)]


def test_table():
    classes = ClassPartition(("bicycle", "cow"), ("car", "bicycle", "dog"), {"bike": "bicycle"})
    assert [" ".join(line.split()) for line in classes.table().splitlines()[2:]] == [
        "shared 1 bicycle (the teacher's bike)",
        "only the student's 1 cow",
        "only the teacher's 2 car, dog",
    ]
