"""What the offline benchmarks hold: counts, labels, disjoint parts."""

from __future__ import annotations

import pytest
import torch

from avalanche_ext.benchmarks import permuted_mnist, split_digits, split_mnist
from avalanche_ext.benchmarks.mnist import load_mnist
from avalanche_ext.benchmarks.streams import cut_by_class, hold_out, split_by_class


def tensors(experience):
    items = [experience.dataset[i] for i in range(len(experience.dataset))]
    x, y, t = zip(*items, strict=True)
    return torch.stack(x), torch.tensor(y), torch.tensor(t)


def counts(stream):
    return [len(e.dataset) for e in stream]


def test_split_digits_has_every_image_once():
    benchmark = split_digits()
    assert sum(counts(benchmark.train_stream)) + sum(counts(benchmark.test_stream)) == 1797
    assert sum(counts(benchmark.test_stream)) == 359
    assert [e.classes_in_this_experience for e in benchmark.train_stream] == [
        [0, 1], [2, 3], [4, 5], [6, 7], [8, 9]
    ]  # fmt: skip
    x, _, t = tensors(benchmark.train_stream[0])
    assert x.shape[1:] == (1, 8, 8)
    assert (x.min(), x.max()) == (0, 1)
    assert t.unique().tolist() == [0]


def test_test_images_do_not_depend_on_the_seed_and_are_never_trained_on():
    one, two = split_digits(seed=0), split_digits(seed=5)
    for a, b in zip(one.test_stream, two.test_stream, strict=True):
        assert torch.equal(tensors(a)[0], tensors(b)[0])
    train = {x.numpy().tobytes() for e in one.train_stream for x in tensors(e)[0]}
    test = [x.numpy().tobytes() for e in one.test_stream for x in tensors(e)[0]]
    assert not train & set(test)


@pytest.mark.parametrize(
    ("scenario", "labels", "tasks"),
    [
        ("class", range(10), [0] * 5),
        ("domain", [0, 1] * 5, [0] * 5),
        ("task", [0, 1] * 5, range(5)),
    ],
)
def test_scenarios_label_as_their_name_says(scenario, labels, tasks):
    stream = split_digits(scenario=scenario).train_stream
    seen = [label for e in stream for label in sorted(set(tensors(e)[1].tolist()))]
    assert seen == list(labels)
    assert [int(tensors(e)[2][0]) for e in stream] == list(tasks)


def test_class_order_maps_labels_to_the_order_of_arrival():
    x = torch.arange(8.0)[:, None]
    y = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    stream = split_by_class((x, y), (x, y), 2, class_order=[3, 1, 0, 2]).train_stream
    (x0, y0, _), (x1, y1, _) = (tensors(e) for e in stream)
    assert x0.flatten().tolist() == [2, 3, 6, 7]
    assert y0.tolist() == [1, 1, 0, 0]
    assert x1.flatten().tolist() == [0, 1, 4, 5]
    assert y1.tolist() == [2, 2, 3, 3]


def test_a_thinned_stream_is_a_random_part_of_each_experience():
    whole, thin, again, other = (
        split_digits(train_per_experience=n, seed=s)
        for n, s in ((None, 0), (30, 0), (30, 0), (30, 1))
    )
    assert counts(thin.train_stream) == [30] * 5
    assert counts(thin.test_stream) == counts(whole.test_stream)
    first = [tensors(b.train_stream[0])[0] for b in (thin, again, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_validation_never_tests_on_test_images():
    images = lambda stream: {x.numpy().tobytes() for e in stream for x in tensors(e)[0]}  # noqa: E731
    plain, held_out = split_digits(), split_digits(validation=True)
    assert images(held_out.test_stream) <= images(plain.train_stream)
    assert not images(held_out.train_stream) & images(held_out.test_stream)


def test_hold_out_takes_the_same_share_of_each_class():
    y = torch.tensor([0] * 10 + [1] * 20)
    (_, kept), (_, out) = hold_out((torch.arange(30), y), share=0.2)
    assert out.bincount().tolist() == [2, 4]
    assert kept.bincount().tolist() == [8, 16]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_digits(3), "10 classes cannot be cut into 3"),
        (lambda: split_digits(0), "cannot be cut into 0"),
        (lambda: split_digits(scenario="tasks"), "'class', 'task', 'domain'"),
        (lambda: split_digits(class_order=[0, 1]), "permutation"),
        (lambda: split_mnist(root="/nowhere"), "download=True"),
    ],
)
def test_bad_input_says_what_to_do(call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()


@pytest.mark.data
def test_split_mnist_is_the_real_one(mnist_root):
    benchmark = split_mnist(root=mnist_root)
    assert counts(benchmark.train_stream) == [12665, 12089, 11263, 12183, 11800]
    assert counts(benchmark.test_stream) == [2115, 2042, 1874, 1986, 1983]


@pytest.mark.data
def test_permuted_mnist_moves_pixels_and_nothing_else(mnist_root):
    benchmark = permuted_mnist(3, train_per_experience=50, root=mnist_root)
    (_, _), (test, labels) = load_mnist(mnist_root)
    streams = [tensors(e) for e in benchmark.test_stream]
    assert torch.equal(streams[0][0], test)
    for x, y, _ in streams:
        assert torch.equal(y, labels)
        assert torch.equal(x.flatten(1).sort(1).values, test.flatten(1).sort(1).values)
    assert not torch.equal(streams[1][0], streams[2][0])
    assert counts(benchmark.train_stream) == [50, 50, 50]


def test_a_larger_first_experience():
    y = torch.arange(10).repeat(3)
    images = (torch.arange(30.0)[:, None], y)
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    benchmark = split_by_class(images, images, 3, class_order=order, first_classes=4)
    assert counts(benchmark.train_stream) == [12, 9, 9]
    labels = [sorted(set(tensors(e)[1].tolist())) for e in benchmark.test_stream]
    assert labels == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    x, y, _ = tensors(benchmark.train_stream[1])
    assert {(int(a) % 10, int(b)) for a, b in zip(x[:, 0], y, strict=True)} == {
        (5, 4), (4, 5), (3, 6),
    }  # fmt: skip


def test_what_is_cut_may_stay_elsewhere():
    """Numbers stand for images; labels may be of any integer type and have gaps."""
    y = torch.tensor([30, 7, 7, 19, 30, 4], dtype=torch.int32)
    numbers = torch.arange(6)
    train, test = cut_by_class((numbers, y), (numbers[:4], y[:4]), 2, class_order=[19, 7, 30, 4])
    assert [(x.tolist(), y.tolist()) for x, y in train] == [
        ([1, 2, 3], [1, 1, 0]), ([0, 4, 5], [2, 2, 3]),
    ]  # fmt: skip
    assert [(x.tolist(), y.tolist()) for x, y in test] == [([1, 2, 3], [1, 1, 0]), ([0], [2])]


@pytest.mark.parametrize("n", [0, -3])
def test_no_images_to_keep(n):
    images = (torch.zeros(10, 1), torch.arange(10))
    with pytest.raises(ValueError, match=f"train_per_experience >= 1 or None; got .*={n}"):
        split_by_class(images, images, 2, train_per_experience=n)


@pytest.mark.parametrize(
    "options",
    [
        {"n_experiences": 4, "first_classes": 5},
        {"n_experiences": 1, "first_classes": 5},
        {"n_experiences": 3, "first_classes": 10},
        {"n_experiences": 3, "first_classes": 4, "scenario": "domain"},
    ],
)
def test_a_first_experience_that_cannot_be(options):
    images = (torch.zeros(10, 1), torch.arange(10))
    with pytest.raises(ValueError, match=f"first_classes={options['first_classes']} of 10"):
        split_by_class(images, images, **options)
