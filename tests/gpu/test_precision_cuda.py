"""Mixed precision and compilation on a CUDA device: run with ``pytest -m gpu``."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch.nn import functional as F

from avalanche_ext.training.plugins.compile import CompilePlugin
from avalanche_ext.training.plugins.drl import DRLPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from tests.conftest import class_stream, naive
from tests.training.plugins.test_compile import CLASSES, Counting, Growing, assert_same, benchmark
from tests.training.plugins.test_precision import DTYPES, ConvNet, Watch, images, mlp, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


@pytest.fixture(autouse=True)
def _exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def train(plugins=(), *, model=None, optimizer="sgd", stream=None, **options):
    torch.manual_seed(1)
    model = (mlp() if model is None else model).cuda()
    strategy = naive(model, plugins, device="cuda", **options)
    strategy.optimizer = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(2)
    for exp in class_stream().train_stream if stream is None else stream:
        strategy.train(exp, eval_streams=[])
    return strategy


def fp16(**options):
    plugin = PrecisionPlugin("fp16", fused_optimizer=options.pop("fused", False))
    plugin.scaler = torch.amp.GradScaler("cuda", **options)
    return plugin


@pytest.mark.parametrize("precision", DTYPES)
def test_forward_is_that_of_autocast(precision):
    watch, model = Watch(), mlp().cuda()
    twin = copy.deepcopy(model)
    train([PrecisionPlugin(precision), watch], model=model)
    x, y, _ = watch.batches[0]
    with torch.autocast("cuda", dtype=DTYPES[precision]):
        expected = twin(x)
    assert expected.dtype == DTYPES[precision]
    assert watch.outputs[0].dtype == torch.float32
    assert torch.equal(watch.outputs[0], expected.float())
    assert torch.equal(watch.losses[0][0], F.cross_entropy(expected.float(), y))


@pytest.mark.parametrize("fused", [True, False])
def test_fp16_is_a_loop_written_by_hand_overflows_included(fused):
    options = {"init_scale": 2.0**24, "growth_interval": 4}
    plugin, watch, model, scales = fp16(fused=fused, **options), Watch(), mlp().cuda(), []
    twin = copy.deepcopy(model)

    class Scale(SupervisedPlugin):
        def after_update(self, strategy, **kwargs):
            scales.append(plugin.scaler.get_scale())

    train([plugin, watch, Scale()], model=model, optimizer="adam", epochs=3)
    scaler = torch.amp.GradScaler("cuda", **options)
    optimizer = torch.optim.Adam(twin.parameters(), 0.01, weight_decay=1e-2, fused=fused)
    skipped = 0
    for step, (x, y, _) in enumerate(watch.batches):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            output = twin(x)
        scaler.scale(F.cross_entropy(output.float(), y)).backward()
        scaler.unscale_(optimizer)
        finite = all(bool(torch.isfinite(p.grad).all()) for p in twin.parameters())
        for ours, parameter in zip(watch.grads[step], twin.parameters(), strict=True):
            expected = parameter.grad if finite else torch.zeros_like(ours)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        scaler.step(optimizer)
        scaler.update()
        skipped += not finite
        assert scales[step] == scaler.get_scale()
        now = weights(SimpleNamespace(model=twin))
        torch.testing.assert_close(watch.after[step], now, rtol=0, atol=1e-5)
    assert 3 < skipped < len(scales) - 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_updates_are_those_of_the_plain_optimizer(optimizer):
    fused = train([PrecisionPlugin("fp32", fused_optimizer=True)], optimizer=optimizer)
    plain = train([], optimizer=optimizer)
    torch.testing.assert_close(weights(fused), weights(plain), rtol=0, atol=2e-6)
    for parameter, state in fused.optimizer.state.items():
        assert all(v.device == parameter.device for v in state.values() if v is not None)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_an_optimizer_with_state_becomes_fused_and_follows_a_growing_head(optimizer):
    stream = class_stream().train_stream

    def run(plugins):
        torch.manual_seed(1)
        strategy = train(model=Growing(), optimizer=optimizer, stream=stream[:1])
        strategy.plugins[:0] = plugins
        for exp in stream[1:]:
            strategy.train(exp, eval_streams=[])
        return strategy

    fused = run([PrecisionPlugin("fp32", fused_optimizer=True)])
    assert all(g["fused"] for g in fused.optimizer.param_groups)
    assert_same(fused, run([]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_channels_last_is_the_same_training(precision):
    torch.manual_seed(1)
    model = ConvNet()
    plain = copy.deepcopy(model)
    stream = images().train_stream
    plugin = PrecisionPlugin(precision, channels_last=True, fused_optimizer=True)
    ours = train([plugin], model=model, optimizer="momentum", stream=stream)
    theirs = train([PrecisionPlugin(precision)], model=plain, optimizer="momentum", stream=stream)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(stride[1] == 1 for stride in model.strides)
    atol = 1e-4 if precision == "fp32" else 2e-2
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=atol)


@pytest.mark.parametrize("precision", DTYPES)
def test_pickled_between_experiences_it_goes_on_to_the_same_weights(precision):
    stream = list(class_stream().train_stream)

    def plugin():
        return PrecisionPlugin(precision, fused_optimizer=True)

    whole = train([plugin()], optimizer="adam", stream=stream)
    half = train([plugin()], optimizer="adam", stream=stream[:2])
    state = torch.get_rng_state()
    resumed = pickle.loads(pickle.dumps(half))
    torch.set_rng_state(state)
    resumed.train(stream[2], eval_streams=[])
    assert torch.equal(weights(resumed), weights(whole))


def test_the_unsupported_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    with pytest.raises(ValueError, match=r"'cuda' does not compute in bfloat16.*'fp16'"):
        train([PrecisionPlugin()])


def evaluated(plugins):
    torch.manual_seed(1)
    bench, model = benchmark(), Growing().cuda()
    strategy = naive(model, plugins, device="cuda")
    strategy.optimizer = OPTIMIZERS["sgd"](model.parameters())
    torch.manual_seed(2)
    for exp in bench.train_stream:
        strategy.train(exp, eval_streams=[])
        with torch.random.fork_rng():
            strategy.eval(bench.test_stream[: exp.current_experience + 1])
    return strategy


@pytest.mark.parametrize("methods", [lambda: [], lambda: [DRLPlugin(1e-2)]], ids=["naive", "drl"])
@pytest.mark.parametrize("then", ["eager", "aot_eager", "inductor"])
def test_compiled_training_is_that_of_the_growing_head(then, methods):
    backend = Counting(then)
    compiled = evaluated([CompilePlugin(CLASSES, backend=backend), *methods()])
    assert_same(compiled, evaluated(methods()), rtol=1e-4, atol=1e-4)
    assert backend.graphs == 2


def test_compiled_in_bfloat16_with_fused_updates():
    backend = Counting("inductor")

    def precision():
        return PrecisionPlugin(fused_optimizer=True)

    compiled = evaluated([CompilePlugin(CLASSES, backend=backend), precision(), DRLPlugin(1e-2)])
    plain = evaluated([precision(), DRLPlugin(1e-2)])
    assert_same(compiled, plain, rtol=5e-2, atol=5e-2)
    assert backend.graphs == 2
