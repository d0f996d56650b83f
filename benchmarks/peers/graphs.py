"""What PyTorch's tests of FX, TorchScript, ``torch.compile``, export and quantization ask of modules with BN."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from benchmarks.peers.layers import CHANNELS, Subject
from benchmarks.peers.registry import NotApplicableError, asks, needs_open_training
from bnprobe.errors import UsageError

_FX, _JIT, _DYNAMO, _EXPORT, _QUANTIZATION = (
    "torch test_fx", "torch test_jit", "torch dynamo", "torch export", "torch quantization",
)  # fmt: skip
_MODES = (True, False)


class Branches(nn.Module):
    """A network that tracing has to find its way through: nested, a layer used twice, a residual sum."""

    def __init__(self, subject: Subject, training: bool) -> None:
        super().__init__()
        self.stem = subject.net(training)
        self.blocks = nn.ModuleList([subject.net(training), subject.net(training)])
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.stem(x)


class _Paths(fx.Tracer):
    """Records the qualified name of the module behind every node, as extractors of features do."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[str] = []
        self.paths: dict[fx.Node, str] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.modules.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.modules.pop()

    def create_proxy(self, kind: str, target: Any, *others: Any, **settings: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *others, **settings)
        self.paths[proxy.node] = self.modules[-1] if self.modules else ""
        return proxy


@asks(_FX)
def symbolic_trace(subject: Subject) -> None:
    """A symbolic trace and a trace of it compute the same and count no batch."""
    for training in _MODES:
        net = Branches(subject, training)
        before, twin = copy.deepcopy(dict(net.state_dict())), copy.deepcopy(net)
        traced = fx.symbolic_trace(net)
        assert_close(dict(net.state_dict()), before)
        expected = twin(subject.batch())
        again = fx.symbolic_trace(copy.deepcopy(traced))
        for each in (traced, again):
            assert_close(each(subject.batch()), expected)
            assert_close(dict(each.named_buffers()), dict(twin.named_buffers()))
        assert_close(traced.eval()(subject.batch()), twin.eval()(subject.batch()))


@asks(_FX)
def layers_are_leaves(subject: Subject) -> None:
    """A trace calls the layer as one node with its qualified name."""
    traced = fx.symbolic_trace(Branches(subject, True))
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert [name for name in called if name.endswith(".1")] == ["stem.1", "blocks.0.1", "blocks.1.1", "stem.1"], called


@asks(_FX)
def features_are_extracted(subject: Subject) -> None:
    """A tracer that records paths finds the layer's node, whose output can be taken instead."""
    net = subject.net(training=False)
    tracer = _Paths()
    traced = fx.GraphModule(net, tracer.trace(net))
    names = {node.name for node, path in tracer.paths.items() if "1" in (path, node.target)}
    nodes = [node for node in traced.graph.nodes if node.name in names]
    assert nodes, {str(node): path for node, path in tracer.paths.items()}
    output = next(node for node in traced.graph.nodes if node.op == "output")
    output.args = (nodes[-1],)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    assert_close(traced(subject.batch()), net[1](net[0](subject.batch())))


@asks(_FX)
def shapes_propagate(subject: Subject) -> None:
    """``ShapeProp`` and ``Interpreter`` run a trace."""
    from torch.fx.passes.shape_prop import ShapeProp

    traced = fx.symbolic_trace(subject.net(training=False))
    ShapeProp(traced).propagate(subject.batch())
    shapes = [node.meta["tensor_meta"].shape for node in traced.graph.nodes]
    assert shapes[-1] == subject.batch().shape


@asks(_FX)
def fusion(subject: Subject) -> None:
    """``fx`` fuses convolution and norm in eval mode rightly, or leaves the norm alone, or refuses."""
    from torch.fx.experimental import optimization

    net = subject.net(training=False)
    expected = net(subject.batch())
    try:
        fused = optimization.fuse(copy.deepcopy(net))
    except UsageError:
        return
    assert_close(fused(subject.batch()), expected, rtol=1e-4, atol=1e-4)


@asks(_JIT)
def script(subject: Subject) -> None:
    """A script computes outputs, gradients and buffers of the layer, also when it was saved and loaded."""
    for training in subject.modes:
        net, twin, file = subject.net(training), subject.net(training), io.BytesIO()
        scripted = torch.jit.script(net)
        torch.jit.save(scripted, file)
        file.seek(0)
        for program in (scripted, torch.jit.load(file)):
            other = copy.deepcopy(twin)
            x, y = (subject.batch().requires_grad_() for _ in range(2))
            out, expected = program(x), other(y)
            assert_close(out, expected, rtol=1e-4, atol=1e-4)
            assert_close(dict(program.named_buffers()), dict(other.named_buffers()))
            gradients = [torch.autograd.grad(z.square().sum(), leaf)[0] for z, leaf in ((out, x), (expected, y))]
            assert_close(*gradients, rtol=1e-2, atol=1e-3)


@asks(_JIT)
def script_changes_mode(subject: Subject) -> None:
    """A script can be switched between training and inference."""
    needs_open_training(subject)
    scripted, twin = torch.jit.script(subject.net()), subject.net()
    for training in (True, False, True):
        found, expected = scripted.train(training)(subject.batch()), twin.train(training)(subject.batch())
        assert_close(found, expected, rtol=1e-4, atol=1e-4)


@asks(_JIT)
def frozen_script(subject: Subject) -> None:
    """``freeze`` and ``optimize_for_inference`` leave the output as it is."""
    net = subject.net(training=False)
    expected = net(subject.batch())
    frozen = torch.jit.freeze(torch.jit.script(copy.deepcopy(net)))
    for program in (frozen, torch.jit.optimize_for_inference(torch.jit.script(copy.deepcopy(net)))):
        for _ in range(3):
            assert_close(program(subject.batch()), expected, rtol=1e-4, atol=1e-4)


@asks(_JIT)
def trace(subject: Subject) -> None:
    """A trace in eval mode passes PyTorch's own check; one in training mode computes the same."""
    for training in subject.modes:
        net, twin = subject.net(training), subject.net(training)
        traced = torch.jit.trace(net, subject.batch(), check_trace=not training)
        other = subject.batch(6, seed=9)  # another batch size
        if subject.has_ghosts and training:
            raise NotApplicableError("by design as many parts as the batch size asks for, which a trace holds fast")
        fresh = dict(twin.state_dict())
        traced.load_state_dict(fresh)
        assert_close(traced(other), twin(other), rtol=1e-4, atol=1e-4)
        assert_close(dict(traced.named_buffers()), dict(twin.named_buffers()))


@asks(_DYNAMO)
def whole_graph(subject: Subject) -> None:
    """``torch.compile`` captures one graph, with the outputs, gradients and buffers of eager code."""
    for training in subject.modes:
        torch.compiler.reset()
        net, twin = subject.net(training), subject.net(training)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for seed in range(3):
            one, other = (subject.batch(seed=seed).requires_grad_() for _ in range(2))
            y, expected = compiled(one), twin(other)
            assert_close(y, expected, rtol=1e-3, atol=1e-4)
            (y.square().sum() * 1e-2).backward()
            (expected.square().sum() * 1e-2).backward()
            assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-3)
        for one, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-2)
        assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), rtol=1e-4, atol=1e-5)


@asks(_DYNAMO)
def dynamic_shapes(subject: Subject) -> None:
    """Batches of changing size run in as few graphs as with BN, also for a cumulative average."""
    needs_open_training(subject)
    for dynamic in (True, None):
        counts = []
        for net in (subject.net(), subject.net()):
            torch.compiler.reset()
            if counts:
                net[1] = subject.plain()  # with a momentum: for a cumulative average BN has no whole graph
            counter, twin = CompileCounter(), copy.deepcopy(net)
            compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)
            for count in (4, 6, 5, 8, 10):
                assert_close(compiled(subject.batch(count)), twin(subject.batch(count)), rtol=1e-3, atol=1e-4)
            assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), rtol=1e-4, atol=1e-5)
            counts.append(counter.frame_count)
        if subject.has_ghosts and counts[0] > counts[1]:
            raise NotApplicableError("by design as many parts as the batch size asks for: a graph for each number")
        assert counts[0] <= counts[1], f"{counts[0]} graphs, BN {counts[1]}, with dynamic={dynamic}"


@asks(_DYNAMO)
def few_graphs(subject: Subject) -> None:
    """Twenty steps, with a change of mode between, compile one graph for each mode."""
    needs_open_training(subject)
    counter = CompileCounter()
    net = subject.net()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for training in (True, False) * 5:
        net.train(training)
        for seed in range(2):
            compiled(subject.batch(seed=seed))
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs"


@asks(_DYNAMO)
def compiled_training(subject: Subject) -> None:
    """Training compiled with ``aot_eager`` and an optimizer leads to the weights of eager training."""
    nets = [subject.net(), subject.net()]
    whole = True in subject.modes
    calls = [torch.compile(nets[0], backend="aot_eager", fullgraph=whole), nets[1]]
    for net, call in zip(nets, calls, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for seed in range(5):
            optimizer.zero_grad()
            (call(subject.batch(seed=seed)) - subject.batch(seed=seed + 1)).square().mean().backward()
            optimizer.step()
    assert_close(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-3, atol=1e-4)


@asks(_DYNAMO)
def compiled_in_place(subject: Subject) -> None:
    """``Module.compile`` works, and the module can still be copied and saved."""
    net, twin = subject.net(), subject.net()
    net.compile(backend="eager")
    assert_close(net(subject.batch()), twin(subject.batch()), rtol=1e-4, atol=1e-4)
    twin.load_state_dict(net.state_dict())


@asks(_DYNAMO)
def compiled_under_autocast(subject: Subject) -> None:
    """Compiled under autocast, outputs have the dtype and values of eager code."""
    for training in subject.modes:
        torch.compiler.reset()
        net, twin = subject.net(training), subject.net(training)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = compiled(subject.batch()), twin(subject.batch())
        assert found.dtype == expected.dtype
        assert_close(found, expected, rtol=0.05, atol=0.05)


@asks(_EXPORT)
def exported(subject: Subject) -> None:
    """``torch.export``, strict and not, with a dynamic batch, gives a program with the same output."""
    for training in subject.modes:
        for strict in (False, True):
            if training and subject.has_ghosts:
                continue  # one graph for each number of parts
            net, twin = subject.net(training), subject.net(training)
            shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
            program = torch.export.export(net, (subject.batch(),), dynamic_shapes=shapes, strict=strict)
            assert_close(
                program.module(check_guards=False)(subject.batch(6)), twin(subject.batch(6)), rtol=1e-4, atol=1e-4
            )


@asks(_EXPORT)
def exported_program_is_saved(subject: Subject) -> None:
    """An exported program is decomposed, saved and loaded."""
    net, file = subject.net(training=False), io.BytesIO()
    expected = net(subject.batch())
    program = torch.export.export(net, (subject.batch(),))
    torch.export.save(program, file)
    file.seek(0)
    for each in (torch.export.load(file), program.run_decompositions()):
        assert_close(each.module(check_guards=False)(subject.batch()), expected, rtol=1e-4, atol=1e-4)


@asks(_EXPORT)
def joint_graph(subject: Subject) -> None:
    """AOT autograd captures forward and backward in one graph."""
    needs_open_training(subject)
    from torch._functorch.aot_autograd import aot_export_module

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = subject.net()

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.net(x).square().mean(),)

    graph, signature = aot_export_module(Loss(), [subject.batch()], trace_joint=True, output_loss_index=0)
    assert any(node.op == "call_function" for node in graph.graph.nodes)
    updated = set(signature.buffers_to_mutate.values())
    assert ("net.1.running_mean" in updated) == (subject.family != "frozen"), updated


@asks(_EXPORT)
def onnx(subject: Subject) -> None:
    """The ONNX exporter's program gives the same output in ONNX Runtime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise NotApplicableError(f"{error.name} is not installed") from error
    net = subject.net(training=False)
    expected = net(subject.batch())
    file = io.BytesIO()
    torch.onnx.export(net, (subject.batch(),), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: subject.batch().numpy()})
    assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@asks(_QUANTIZATION)
def prepared_by_fx(subject: Subject) -> None:
    """``prepare_fx`` and ``convert_fx`` keep or fuse the layer: outputs stay near those in float32."""
    if subject.dimensions != 2:
        raise NotApplicableError("asked of 2d layers only")
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    net = subject.net(training=False)
    expected = net(subject.batch())
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "x86" if "x86" in engines else engines[-1]
    mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
    try:
        prepared = prepare_fx(net, mapping, (subject.batch(),))
    except UsageError:
        return
    for seed in range(4):
        prepared(subject.batch(seed=seed))
    assert_close(convert_fx(prepared)(subject.batch()), expected, rtol=0.2, atol=0.3)


@asks(_QUANTIZATION)
def quantized_dynamically(subject: Subject) -> None:
    """``quantize_dynamic`` leaves the layer alone."""
    net = nn.Sequential(subject.layer(training=False), nn.Flatten(), nn.LazyLinear(CHANNELS))
    net(subject.batch())
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    assert_close(quantized[0](subject.batch()), net[0](subject.batch()))


@asks(_QUANTIZATION)
def conv_bn_folding(subject: Subject) -> None:
    """``fuse_conv_bn_eval`` is right or refuses."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    net = subject.net(training=False)
    try:
        fused = fuse_conv_bn_eval(net[0], net[1])
    except UsageError:
        if subject.family in ("instance", "weighed", "domain"):
            return
        raise
    assert_close(fused(subject.batch()), net[1](net[0](subject.batch())), rtol=1e-4, atol=1e-4)
