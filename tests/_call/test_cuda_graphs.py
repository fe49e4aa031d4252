"""CUDA graphs: warm ops are captured and replay, and nothing is ever compiled inside a capture."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import dispatch_compile as dc

pytestmark = pytest.mark.cuda

HIDDEN = 1024


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def mode():
    return dc.DispatchCompileMode(trace=True)


def random(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)


def norm(x: Tensor) -> Tensor:
    return dc.ops.rms_norm(x, None, 1e-6)


def assert_agree(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=1e-3)


def actions(mode: dc.DispatchCompileMode) -> list[str]:
    return [event.action for event in mode.trace.events]


def captured(fn, x: Tensor, **options) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        result = fn(x)
    return graph, result


def replayed(graph: torch.cuda.CUDAGraph, x: Tensor, result: Tensor) -> None:
    for _ in range(3):
        x.copy_(random(x.shape[0]))
        graph.replay()
        assert_agree(result, norm(x))


def test_a_warm_op_is_captured_and_replays_with_new_contents(mode):
    x = random(64)
    with mode:
        norm(x)
        graph, result = captured(norm, x)
    assert actions(mode) == ["compiled", "compiled"]
    replayed(graph, x, result)


def test_inside_an_opaque_op(mode, define_opaque):
    def body(x: Tensor) -> Tensor:
        return norm(x * 2)

    op, x = define_opaque(body), random(64)
    with mode:
        op(x)
        graph, result = captured(op, x)
    assert actions(mode) == ["compiled", "compiled"]
    x.copy_(random(64))
    graph.replay()
    assert_agree(result, norm(x * 2))


def test_an_op_that_is_not_compiled_yet_runs_eagerly_in_a_capture_and_compiles_right_after_it(mode):
    x = random(64)
    norm(x)  # loads the native kernels, which a capture cannot
    with mode:
        graph, result = captured(norm, x)
        assert mode.cache.stats() == dc.CacheStats(compiles=0, hits=0, fallbacks=1, asides=0)
        norm(x)
        assert mode.cache.stats() == dc.CacheStats(compiles=1, hits=1, fallbacks=1, asides=0)
    assert actions(mode) == ["eager", "compiled"]
    assert mode.trace.events[0].reason == "not compiled yet, and a CUDA graph is being captured"
    replayed(graph, x, result)


def test_other_token_counts_of_a_capture_are_served_by_the_same_code(mode):
    with mode:
        norm(random(64))
        graphs = [(*captured(norm, x), x) for x in map(random, (8, 16, 512))]
    assert mode.cache.stats().compiles == 1
    for graph, result, x in graphs:
        replayed(graph, x, result)


def test_warmup_leaves_nothing_to_compile_in_a_capture(mode):
    mode.warmup(dc.ops.rms_norm, random(4), None, 1e-6, tokens=[1, 64])
    compiles = mode.cache.stats().compiles
    with mode:
        graphs = [(*captured(norm, x), x) for x in map(random, (1, 2, 64))]
    assert actions(mode) == ["compiled"] * 3
    assert mode.cache.stats().compiles == compiles == 2
    for graph, result, x in graphs:
        replayed(graph, x, result)


def test_several_graphs_share_a_pool(mode):
    pool = torch.cuda.graph_pool_handle()
    inputs = [random(tokens) for tokens in (64, 16, 1)]
    with mode:
        norm(random(64))
        norm(random(1))
        graphs = [captured(norm, x, pool=pool) for x in inputs]
    assert set(actions(mode)) == {"compiled"}
    for _ in range(2):  # graphs of one pool share memory, so each result is looked at before the next replay
        for x, (graph, result) in zip(inputs, graphs, strict=True):
            replayed(graph, x, result)


def test_a_capture_on_a_stream_of_its_own(mode):
    x, stream = random(64), torch.cuda.Stream()
    with mode:
        norm(x)
        torch.cuda.synchronize()
        graph, result = captured(norm, x, stream=stream)
    assert actions(mode) == ["compiled", "compiled"]
    replayed(graph, x, result)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "not compiled yet"])
def test_a_side_stream_joins_the_capture(warm, mode):
    """As engines overlap shared experts with routed ones."""
    x, side = random(64), torch.cuda.Stream()

    def forked(x: Tensor) -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = norm(x)
        main = norm(x + 1)
        torch.cuda.current_stream().wait_stream(side)
        return main + beside

    expected = forked(x)
    torch.cuda.synchronize()
    with mode:
        if warm:
            norm(x)
        mode.trace.clear()
        graph, result = captured(forked, x)
    assert actions(mode) == ["compiled" if warm else "eager"] * 2
    for _ in range(3):
        graph.replay()
    assert_agree(result, expected)


def test_a_graph_captured_with_the_mode_replays_without_it(mode):
    x = random(64)
    with mode:
        norm(x)
        graph, result = captured(norm, x)
    mode.cache.clear()
    del mode
    replayed(graph, x, result)


def test_make_graphed_callables(mode):
    x = random(64).clone()

    with torch.inference_mode(False), torch.no_grad(), mode:
        x = torch.randn(64, HIDDEN, device="cuda", dtype=torch.bfloat16)
        graphed = torch.cuda.make_graphed_callables(norm, (x,))
        assert_agree(graphed(x), norm(x))
    assert mode.cache.stats().fallbacks == 0


def test_first_calls_on_several_threads_and_streams_compile_once(mode):
    x, failures = random(64), []
    expected = norm(x)
    torch.cuda.synchronize()
    barrier = threading.Barrier(4)

    def work() -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()), mode:
                barrier.wait()
                assert_agree(norm(x), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert mode.cache.stats().compiles == 1
