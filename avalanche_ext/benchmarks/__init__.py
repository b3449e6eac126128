"""Functions that return Avalanche benchmarks; the first ones need no download."""

from avalanche_ext.benchmarks.cifar import split_cifar10, split_cifar100, split_svhn
from avalanche_ext.benchmarks.core50 import core50
from avalanche_ext.benchmarks.core50_tree import write_core50_tree
from avalanche_ext.benchmarks.digits import split_digits
from avalanche_ext.benchmarks.image_folders import split_image_folder
from avalanche_ext.benchmarks.mnist import permuted_mnist, split_mnist
from avalanche_ext.benchmarks.toy_core50 import toy_core50

__all__ = [
    "core50",
    "permuted_mnist",
    "split_cifar10",
    "split_cifar100",
    "split_digits",
    "split_image_folder",
    "split_mnist",
    "split_svhn",
    "toy_core50",
    "write_core50_tree",
]
