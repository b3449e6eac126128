"""Mixed precision against loops written by hand."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule, as_multitask
from avalanche.training.plugins import (
    EWCPlugin,
    GEMPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.supervised import MER, Naive
from torch import nn
from torch.nn import functional as F

from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.ber import BERPlugin
from avalanche_ext.training.plugins.drl import DRLPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from avalanche_ext.training.wrapping import wrap
from tests.conftest import blobs, class_stream, naive

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYERS = ("forward", "backward", "optimizer_step")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}


def mlp(seed=1):
    torch.manual_seed(seed)
    return MLP(8, (16,), 6)


def train(plugins=(), *, model=None, optimizer=None, stream=None, cls=None, seed=3, **options):
    model = mlp() if model is None else model
    stream = class_stream().train_stream if stream is None else stream
    strategy = naive(model, plugins, **options)
    if optimizer is not None:
        strategy.optimizer = OPTIMIZERS[optimizer](model.parameters())
    if cls is not None:
        strategy.__class__ = cls
    torch.manual_seed(seed)
    for exp in stream:
        strategy.train(exp, eval_streams=[])
    return strategy


def weights(strategy):
    return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])


def at_order_10(plugin, name):
    """A layer further in, as a mean over ranks is."""

    class Inner(SupervisedPlugin):
        def before_training(self, strategy, **kwargs):
            wrap(strategy, name, self.layer, order=10)

        def layer(self, strategy, inner):
            return plugin(strategy, inner)

    return Inner()


class Watch(SupervisedPlugin):
    """What the other plugins and the metrics see at every step."""

    def __init__(self):
        super().__init__()
        self.batches, self.outputs, self.losses, self.grads, self.after = [], [], [], [], []

    def before_forward(self, strategy, **kwargs):
        self.batches.append([t.clone() for t in strategy.mbatch])

    def after_forward(self, strategy, **kwargs):
        self.outputs.append(strategy.mb_output.detach().clone())

    def after_backward(self, strategy, **kwargs):
        self.losses.append(strategy.loss.detach().clone())
        self.grads.append([p.grad.clone() for p in strategy.model.parameters()])

    def after_update(self, strategy, **kwargs):
        self.after.append(weights(strategy).clone())


class Evaluate(SupervisedPlugin):
    """Evaluate in the middle of an experience."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def after_training_epoch(self, strategy, **kwargs):
        with torch.random.fork_rng():
            strategy.eval(self.stream)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=2)
        self.classifier = nn.Linear(8, 6)
        self.strides = []

    def forward(self, x):
        self.strides.append(x.stride())
        h = self.conv2(F.relu(self.norm(self.conv1(x))))
        return self.classifier(h.mean((2, 3)))


def images():
    from avalanche.benchmarks import tensors_benchmark

    parts = []
    for k in range(2):
        data = blobs(n_per_class=8, n_classes=6, width=3 * 6 * 6, seed=k)
        x, y = data.tensors
        keep = y // 3 == k
        parts.append((x[keep].view(-1, 3, 6, 6), y[keep]))
    return tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0, 0])


# plain ------------------------------------------------------------------------------------


def test_fp32_without_options_is_naive_bit_for_bit():
    watch = Watch()
    strategy = train([PrecisionPlugin("fp32"), watch])
    plain = Watch()
    assert torch.equal(weights(strategy), weights(train([plain])))
    assert all(map(torch.equal, watch.losses, plain.losses))


# forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
def test_forward_is_that_of_autocast(precision):
    watch = Watch()
    model = mlp()
    twin = copy.deepcopy(model)
    train([PrecisionPlugin(precision), watch], model=model, stream=class_stream().train_stream[:1])
    x, y, _ = watch.batches[0]
    with torch.autocast("cpu", dtype=DTYPES[precision]):
        expected = twin(x)
    assert expected.dtype == DTYPES[precision]
    assert watch.outputs[0].dtype == torch.float32
    assert torch.equal(watch.outputs[0], expected.float())
    assert not torch.equal(watch.outputs[0], twin(x))
    assert watch.losses[0].dtype == torch.float32
    assert torch.equal(watch.losses[0][0], F.cross_entropy(expected.float(), y))


def test_bf16_training_is_a_loop_written_by_hand():
    watch, model = Watch(), mlp()
    twin = copy.deepcopy(model)
    train([PrecisionPlugin(), watch], model=model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for x, y, _ in watch.batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = twin(x)
        F.cross_entropy(output.float(), y).backward()
        optimizer.step()
    assert torch.equal(weights(SimpleNamespace(model=twin)), weights(SimpleNamespace(model=model)))


@pytest.mark.parametrize("precision", DTYPES)
def test_evaluation_has_the_precision_of_training(precision):
    seen = []

    class Look(SupervisedPlugin):
        def after_eval_forward(self, strategy, **kwargs):
            with torch.autocast("cpu", dtype=DTYPES[precision]):
                expected = strategy.model(strategy.mb_x)
            seen.append(torch.equal(strategy.mb_output, expected.float()))

    strategy = naive(mlp(), [PrecisionPlugin(precision), Look()])
    strategy.eval(class_stream().test_stream)
    assert seen == [True] * 3
    assert not set(LAYERS) & set(vars(strategy))


class OwnForward(Naive):
    def forward(self):
        out = self.model(self.mb_x)
        self.inner_dtype = out.dtype
        return {"logits": out, "pair": (out, self.mb_y)}

    def criterion(self):
        assert self.mb_output["pair"][0].dtype == torch.float32
        return self._criterion(self.mb_output["logits"], self.mb_y)


def test_a_strategy_with_a_forward_of_its_own():
    strategy = train([PrecisionPlugin()], cls=OwnForward)
    assert strategy.inner_dtype == torch.bfloat16


class MultiHead(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(8, 16)
        self.classifier = MultiHeadClassifier(16, initial_out_features=6)

    def forward(self, x, task_labels):
        return self.classifier(torch.relu(self.features(x)), task_labels)


def decorated():
    """Its attributes are set on the network inside."""
    return as_multitask(
        nn.Sequential(OrderedDict(body=nn.Linear(8, 16), head=nn.Linear(16, 6))), "head"
    )


@pytest.mark.parametrize("model", [MultiHead, decorated])
@pytest.mark.parametrize("precision", DTYPES)
def test_a_multi_head_model(precision, model):
    stream = class_stream(task_labels=True)
    strategy = train([PrecisionPlugin(precision)], model=model(), stream=stream.train_stream)
    strategy.eval(stream.test_stream)
    assert torch.isfinite(weights(strategy)).all()
    assert not any("forward_single_task" in vars(m) for m in strategy.model.modules())


# fp16 ---------------------------------------------------------------------------------------


def fp16(init_scale=2.0**8, **kwargs):
    plugin = PrecisionPlugin("fp16")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **kwargs)
    return plugin


def by_hand_fp16(model, batches, scaler, *, optimizer="sgd", clip=None):
    """Gradients, weights and scale at each step of a training loop with torch's scaler."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    grads, after, scales = [], [], []
    for x, y, _ in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(x)
        scaler.scale(F.cross_entropy(output.float(), y)).backward()
        scaler.unscale_(optimizer)
        grads.append([p.grad.clone() for p in model.parameters()])
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        after.append(weights(SimpleNamespace(model=model)).clone())
        scales.append(scaler.get_scale())
    return grads, after, scales


def test_fp16_gradients_and_weights_are_those_of_a_loop_written_by_hand():
    watch, model, plugin = Watch(), mlp(), fp16()
    twin = copy.deepcopy(model)
    train([plugin, watch], model=model)
    grads, after, _ = by_hand_fp16(twin, watch.batches, torch.amp.GradScaler("cpu", 2.0**8))
    assert len(grads) == len(watch.grads) == 15
    for ours, theirs in zip(watch.grads, grads, strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert any(g.any() for g in ours)
    assert all(map(torch.equal, watch.after, after))
    assert float(watch.losses[0]) < 20  # as metrics see it: not scaled


def test_the_scale_starts_where_torch_starts_it():
    plugin = PrecisionPlugin("fp16")
    train([plugin], lr=0.0, stream=class_stream().train_stream[:1])
    assert plugin.scaler.state_dict() | {"scale": 0, "_growth_tracker": 0} == (
        torch.amp.GradScaler("cpu").state_dict() | {"scale": 0, "_growth_tracker": 0}
    )
    assert plugin.scaler._init_scale == 2.0**16


class Clip(SupervisedPlugin):
    def before_update(self, strategy, **kwargs):
        nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.05)


@pytest.mark.parametrize("first", [True, False])
def test_clipping_sees_gradients_without_the_scale(first):
    watch, model = Watch(), mlp()
    twin = copy.deepcopy(model)
    plugins = [fp16(), Clip()][:: 1 if first else -1]
    train([*plugins, watch], model=model)
    scaler = torch.amp.GradScaler("cpu", 2.0**8)
    _, after, _ = by_hand_fp16(twin, watch.batches, scaler, clip=0.05)
    assert all(map(torch.equal, watch.after, after))


def test_a_step_that_overflows_is_skipped_and_the_scale_halves():
    options = {"init_scale": 2.0**24, "growth_interval": 4}
    plugin, watch, model = fp16(**options), Watch(), mlp()
    twin, start = copy.deepcopy(model), weights(SimpleNamespace(model=model)).clone()
    scales = []

    class Scale(SupervisedPlugin):
        def after_update(self, strategy, **kwargs):
            scales.append(plugin.scaler.get_scale())

    # momentum and weight decay: a step with gradients of zero would move the weights
    train([plugin, watch, Scale()], model=model, optimizer="momentum", epochs=3)
    scaler = torch.amp.GradScaler("cpu", **options)
    grads, after, expected = by_hand_fp16(twin, watch.batches, scaler, optimizer="momentum")
    assert scales == expected
    assert all(map(torch.equal, watch.after, after))
    overflow = [not all(torch.isfinite(g).all() for g in step) for step in grads]
    assert overflow[:3] == [True] * 3
    assert 5 < sum(overflow) < len(overflow) - 20
    assert scales[:3] == [2.0**23, 2.0**22, 2.0**21]
    assert torch.equal(watch.after[2], start)
    for ours, theirs, skipped in zip(watch.grads, grads, overflow, strict=True):
        if skipped:  # plugins see zero, never an infinite gradient
            assert not any(g.any() for g in ours)
        else:
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("first", [True, False])
def test_layers_further_in_see_the_scaled_gradient(first):
    inner = []

    def reduce(strategy, backward):
        backward()
        inner.append(strategy.model.classifier.bias.grad.clone())

    watch, plugins = Watch(), [fp16(), at_order_10(reduce, "backward")]
    train([*plugins[:: 1 if first else -1], watch])
    assert len(inner) == 15
    for scaled, grads in zip(inner, watch.grads, strict=True):
        assert torch.equal(scaled, grads[-1] * 2.0**8)
        assert scaled.any()


class TwoBackwards(Naive):
    def backward(self):
        self.loss.backward(retain_graph=True)


def test_fp16_refuses_two_backward_passes_per_step():
    class Again(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            strategy.backward()

    with pytest.raises(ValueError, match=r"one backward\(\) per optimizer_step"):
        train([PrecisionPlugin("fp16"), Again()], cls=TwoBackwards)
    train([PrecisionPlugin("bf16"), Again()], cls=TwoBackwards)


def test_fp16_refuses_a_strategy_that_computes_gradients_by_itself():
    def mer(precision):
        model = mlp()
        return MER(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), mem_size=20,
            batch_size_mem=4, train_mb_size=8, plugins=[PrecisionPlugin(precision)],
            evaluator=None, criterion=nn.CrossEntropyLoss(),
        )  # fmt: skip

    exp = class_stream().train_stream[0]
    with pytest.raises(ValueError, match="which MER does not call"):
        mer("fp16").train(exp, eval_streams=[])
    mer("bf16").train(exp, eval_streams=[])


# life of the layers -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluation_in_mid_training_changes_nothing(precision):
    stream = class_stream().test_stream
    evaluated = train([PrecisionPlugin(precision), Evaluate(stream)], epochs=2)
    assert torch.equal(weights(evaluated), weights(train([PrecisionPlugin(precision)], epochs=2)))
    assert not set(LAYERS) & set(vars(evaluated))


def test_periodic_evaluation_keeps_the_layers_in_training():
    names = []

    class Look(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            names.append(set(LAYERS) & set(vars(strategy)))

    strategy = naive(mlp(), [PrecisionPlugin("fp16"), Look()], eval_every=1, epochs=2)
    bench = class_stream()
    strategy.train(bench.train_stream[0], eval_streams=[bench.test_stream])
    assert names == [set(LAYERS)] * 10
    assert not set(LAYERS) & set(vars(strategy))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_strategy_is_clean_afterwards(precision):
    strategy = naive(mlp(), [PrecisionPlugin(precision)])
    before = set(vars(strategy))
    strategy.train(class_stream().train_stream[0], eval_streams=[])
    assert set(vars(strategy)) == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pickled_between_experiences_it_goes_on_to_the_same_weights(precision):
    stream = list(class_stream().train_stream)
    plugin = PrecisionPlugin(precision, fused_optimizer=True)
    if precision == "fp16":
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=4)
    whole = train([copy.deepcopy(plugin)], optimizer="adam", stream=stream)
    half = train([plugin], optimizer="adam", stream=stream[:2])
    state = torch.get_rng_state()
    resumed = pickle.loads(pickle.dumps(half))
    torch.set_rng_state(state)
    resumed.train(stream[2], eval_streams=[])
    assert torch.equal(weights(resumed), weights(whole))
    if precision == "fp16":
        scales = [s.plugins[0].scaler.state_dict() for s in (resumed, whole)]
        assert scales[0] == scales[1]
        assert scales[0]["scale"] == 2.0**4  # 15 steps: it has grown three times
        assert scales[0]["_growth_tracker"] == 3


class Store(SupervisedPlugin):
    """Pickle the strategy in the middle of an experience."""

    stored = b""

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == 7:
            # pickle cannot store Avalanche's streams, and resuming does not need them
            names = ("experience", "dataloader", "adapted_dataset", "_eval_streams")
            kept = {name: getattr(strategy, name) for name in names}
            vars(strategy).update(dict.fromkeys(names))
            self.stored = pickle.dumps(strategy)
            vars(strategy).update(kept)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pickled_in_the_middle_of_an_experience(precision):
    store = Store()
    train([PrecisionPlugin(precision), store])
    half = pickle.loads(store.stored)
    assert set(LAYERS) & set(vars(half))
    torch.manual_seed(5)
    half.train(class_stream().train_stream[2], eval_streams=[])
    assert torch.isfinite(weights(half)).all()
    assert not set(LAYERS) & set(vars(half))


# composition --------------------------------------------------------------------------------

METHODS = {
    "ewc": lambda: EWCPlugin(ewc_lambda=1.0),
    "lwf": lambda: LwFPlugin(alpha=1.0, temperature=2.0),
    "gem": lambda: GEMPlugin(10, 0.5),
    "replay": lambda: ReplayPlugin(mem_size=20),
    "drl": lambda: DRLPlugin(1e-2),
    "ber": lambda: BERPlugin(mem=20),
    "drl+ber": lambda: (DRLPlugin(1e-2), BERPlugin(mem=20)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_composes_with_every_method_in_either_order(method, precision):
    made = METHODS[method]
    plugins = list(made()) if isinstance(made(), tuple) else [made()]
    again = list(made()) if isinstance(made(), tuple) else [made()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = weights(train([PrecisionPlugin(precision), *plugins]))
        last = weights(train([*again, PrecisionPlugin(precision)]))
        full = weights(train(made() if isinstance(made(), tuple) else [made()]))
    assert torch.equal(first, last)
    assert not torch.equal(first, full)
    torch.testing.assert_close(first, full, rtol=0, atol=0.08)


# layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("fused", [True, False])
def test_channels_last_is_the_same_training(optimizer, fused):
    torch.manual_seed(1)
    model = ConvNet()
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    ids = [id(p) for p in model.parameters()]
    stream = images()
    plugin = PrecisionPlugin("fp32", channels_last=True, fused_optimizer=fused)
    options = {"optimizer": optimizer, "stream": stream.train_stream}
    strategy = train([plugin], model=model, **options)
    assert [id(p) for p in model.parameters()] == ids
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv1.weight.is_contiguous()
    assert all(stride[1] == 1 for stride in model.strides)
    other = train([], model=plain, **options)
    torch.testing.assert_close(weights(strategy), weights(other), rtol=0, atol=2e-5)
    evaluated = naive(twin, [PrecisionPlugin("fp32", channels_last=True)])
    evaluated.eval(stream.test_stream)
    assert twin.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(stride[1] == 1 for stride in twin.strides)


def test_momentum_from_before_follows_the_layout():
    model = ConvNet()
    stream = images().train_stream
    strategy = train([], model=model, optimizer="momentum", stream=stream[:1])
    twin = copy.deepcopy(strategy)
    strategy.plugins.insert(0, PrecisionPlugin("fp32", channels_last=True, fused_optimizer=True))
    for s in (strategy, twin):
        torch.manual_seed(2)
        s.train(stream[1], eval_streams=[])
    buffer = strategy.optimizer.state[model.conv1.weight]["momentum_buffer"]
    assert buffer.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights(strategy), weights(twin), rtol=0, atol=2e-5)


# optimizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_updates_are_those_of_the_plain_optimizer(optimizer):
    fused = train([PrecisionPlugin("fp32", fused_optimizer=True)], optimizer=optimizer)
    plain = train([], optimizer=optimizer)
    assert all(g["fused"] and not g["foreach"] for g in fused.optimizer.param_groups)
    torch.testing.assert_close(weights(fused), weights(plain), rtol=0, atol=1e-6)


class Growing(nn.Module):
    def __init__(self):
        from avalanche.models import IncrementalClassifier

        super().__init__()
        self.features = nn.Linear(8, 16)
        self.classifier = IncrementalClassifier(16, 1)

    def forward(self, x):
        return self.classifier(torch.relu(self.features(x)))


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adagrad"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fused_updates_and_the_scale_follow_a_growing_head(optimizer, precision):
    def run(plugins):
        torch.manual_seed(2)
        return train(plugins, model=Growing(), optimizer=optimizer)

    fused = run([PrecisionPlugin(precision, fused_optimizer=True)])
    plain = run([PrecisionPlugin(precision)])
    assert fused.model.classifier.classifier.out_features == 6
    torch.testing.assert_close(weights(fused), weights(plain), rtol=0, atol=2e-6)


def test_an_optimizer_with_state_becomes_fused():
    stream = class_stream().train_stream
    strategy = train([], optimizer="adam", stream=stream[:1])
    for state in strategy.optimizer.state.values():
        state["step"] = state["step"].double()
    twin = copy.deepcopy(strategy)
    strategy.plugins.insert(0, PrecisionPlugin("fp32", fused_optimizer=True))
    for s in (strategy, twin):
        torch.manual_seed(2)
        s.train(stream[1], eval_streams=[])
    assert {s["step"].dtype for s in strategy.optimizer.state.values()} == {torch.float32}
    torch.testing.assert_close(weights(strategy), weights(twin), rtol=0, atol=1e-6)


def test_fused_momentum_starts_for_heads_whose_first_gradient_comes_late():
    def run(plugins):
        torch.manual_seed(2)
        stream = class_stream(task_labels=True).train_stream
        return train(plugins, model=MultiHead(), optimizer="momentum", stream=stream)

    fused = run([PrecisionPlugin("fp32", fused_optimizer=True)])
    torch.testing.assert_close(weights(fused), weights(run([])), rtol=0, atol=2e-6)


def test_an_optimizer_without_fused_kernels_is_an_error():
    strategy = naive(mlp(), [PrecisionPlugin("fp32", fused_optimizer=True)])
    strategy.optimizer = torch.optim.RMSprop(strategy.model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"no fused kernels for RMSprop.*Adagrad"):
        strategy.train(class_stream().train_stream[0], eval_streams=[])
    strategy.optimizer = torch.optim.Adam(strategy.model.parameters(), differentiable=True)
    with pytest.raises(ValueError, match="differentiable"):
        strategy.train(class_stream().train_stream[0], eval_streams=[])
    strategy.optimizer = torch.optim.SGD(
        strategy.model.parameters(), 0.1, momentum=0.9, dampening=0.5
    )
    with pytest.raises(ValueError, match="dampening"):
        strategy.train(class_stream().train_stream[0], eval_streams=[])


# errors -------------------------------------------------------------------------------------


def test_unknown_arguments_are_named():
    with pytest.raises(ValueError, match=r"'fp32', 'bf16', 'fp16'.*'half'"):
        PrecisionPlugin("half")
    with pytest.raises(ValueError, match=r"channels_last.*'yes'"):
        PrecisionPlugin(channels_last="yes")
    with pytest.raises(ValueError, match=r"fused_optimizer.*None"):
        PrecisionPlugin(fused_optimizer=None)


def on(device):
    return SimpleNamespace(device=torch.device(device), optimizer=None)


@pytest.mark.parametrize("hook", ["before_training", "before_eval"])
def test_a_precision_that_the_device_lacks_is_an_error(hook, monkeypatch):
    with pytest.raises(ValueError, match=r"'bf16' needs autocast.*'meta'.*precision='fp32'"):
        getattr(PrecisionPlugin(), hook)(on("meta"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    with pytest.raises(ValueError, match=r"'cuda:0' does not compute in bfloat16.*'fp16'"):
        getattr(PrecisionPlugin(), hook)(on("cuda:0"))


@pytest.mark.parametrize("kind", [UserWarning, RuntimeError])
def test_a_dtype_that_autocast_lacks_is_an_error(kind, monkeypatch):
    def autocast(device, dtype):
        if kind is RuntimeError:
            raise RuntimeError("no such dtype")
        warnings.warn("no such dtype", stacklevel=2)

    monkeypatch.setattr(torch, "autocast", autocast)
    with pytest.raises(ValueError, match=r"'fp16' is not offered.*'cpu' \(no such dtype\)"):
        PrecisionPlugin("fp16").before_training(on("cpu"))
