"""Functions that return Avalanche benchmarks on tensors; the first ones need no download."""

from avalanche_ext.benchmarks.cifar import split_cifar100
from avalanche_ext.benchmarks.digits import split_digits
from avalanche_ext.benchmarks.mnist import permuted_mnist, split_mnist

__all__ = ["permuted_mnist", "split_cifar100", "split_digits", "split_mnist"]
