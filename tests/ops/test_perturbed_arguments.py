"""perturbed: its arguments, its workspace, threads and the registered operators."""

import math
import threading

import pytest
import torch
from cases import DEVICE
from perturbed_lists import IMPLS, KERNELS, assert_bits, bits, draw, impls

from fastmeta.ops import free_workspace, perturbed

pytestmark = pytest.mark.usefixtures("on_device")


@impls
def test_empty_list(impl):
    with perturbed([], [], 0.1, impl=impl) as perturbation:
        perturbation.flip()
    torch.testing.assert_close(perturbation.epsilon.cpu(), torch.tensor(0.1, device="cpu"))


THETA, OTHER = torch.ones(3, device=DEVICE), torch.ones(2, device=DEVICE)


@impls
@pytest.mark.parametrize(
    ("params", "direction", "radius", "error", "words"),
    [
        ([THETA], [], 0.1, ValueError, "direction must have 1 tensors like params, got 0"),
        ([OTHER, THETA], [OTHER + 1, OTHER - 1], 0.1, ValueError, r"direction\[1\] .* = \[3\], got \[2\]"),
        ({"a.b": THETA}, {"a.b": OTHER}, 0.1, ValueError, r"direction\['a.b'\] must be .*params\['a.b'\]"),
        ({"a": THETA}, {"b": THETA}, 0.1, ValueError, "direction must have the keys of params.*'a', 'b'"),
        ({"a": THETA}, [THETA], 0.1, TypeError, "both be lists or both be dicts"),
        (THETA, [THETA], 0.1, TypeError, "params must be a list or dict of tensors, got a tensor"),
        ([THETA], [THETA.double()], 0.1, TypeError, r"direction\[0\] must be float32 like params\[0\], got float64"),
        ([THETA.long()], [THETA.long()], 0.1, TypeError, r"params\[0\] must be float32, bfloat16"),
        ([THETA], [None], 0.1, TypeError, r"direction\[0\] must be a tensor, got NoneType"),
        ([None], [THETA], 0.1, TypeError, r"params\[0\] must be a tensor, got NoneType"),
        ([THETA], [THETA + 1], -0.1, ValueError, "radius must be >= 0"),
        ([THETA], [THETA + 1], math.nan, ValueError, "radius must be finite"),
        ([THETA], [THETA + 1], "far", TypeError, "radius must be a number"),
        (
            [THETA, OTHER, THETA],
            [THETA + 1, OTHER + 1, THETA + 1],
            0.1,
            ValueError,
            r"params\[0\] and params\[2\] must",
        ),
        ([THETA, THETA[1:]], [THETA + 1, OTHER + 1], 0.1, ValueError, "must not share memory"),
        ([THETA], [THETA], 0.1, ValueError, r"params\[0\] and direction\[0\] must not share memory"),
        ([OTHER[:1].expand(3)], [THETA], 0.1, ValueError, r"params\[0\] must have memory of its own"),
    ],
)
def test_bad_argument_is_named_before_memory_is_touched(impl, params, direction, radius, error, words):
    with pytest.raises(error, match=words), perturbed(params, direction, radius, impl=impl):
        raise AssertionError("not entered")
    assert THETA.tolist() == [1, 1, 1]
    assert OTHER.tolist() == [1, 1]


@pytest.mark.skipif("cpp" not in IMPLS, reason="on a GPU torch keeps the memory")
def test_backup_is_kept_exclusive_and_freed(generator):
    free_workspace()
    params, direction = draw(generator), draw(generator)
    size = sum(-(-p.numel() * 8 // 64) * 64 for p in params) + 64
    with perturbed(params, direction, 0.1) as first:
        backup = first._moved.backup.data_ptr()
        with perturbed(draw(generator), direction, 0.1) as second:
            assert second._moved.backup.data_ptr() != backup
        assert free_workspace() == size
    with perturbed(params, direction, 0.1) as again:
        assert again._moved.backup.data_ptr() == backup
        assert free_workspace() == 0
    assert free_workspace() == size


@impls
def test_threads_do_not_meet(impl, generator):
    jobs = [(draw(generator), draw(generator)) for _ in range(3)]
    before = [bits(params) for params, _ in jobs]
    errors = []

    def work(params, direction):
        try:
            for _ in range(20):
                start = bits(params)
                with perturbed(params, direction, 0.1, impl=impl) as perturbation:
                    perturbation.flip()
                assert_bits(params, start)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for (params, _), start in zip(jobs, before, strict=True):
        assert_bits(params, start)


@pytest.mark.skipif(not KERNELS, reason="no kernel")
def test_opcheck(generator):
    operators = torch.ops.fastmeta
    params, direction = draw(generator, torch.float32, [(5,), (2, 3)]), draw(generator, torch.float32, [(5,), (2, 3)])
    torch.library.opcheck(operators.perturb_epsilon.default, (direction, 0.1))
    backup, epsilon = torch.zeros(256, dtype=torch.uint8), torch.tensor(0.1)
    torch.library.opcheck(operators.perturb_.default, (params, direction, backup, epsilon, 1.0, True))
    operators.perturb_(params, direction, backup, epsilon, 1.0, True)
    torch.library.opcheck(operators.perturb_.default, (params, direction, backup, epsilon, -1.0, False))
    torch.library.opcheck(operators.perturb_restore_.default, (params, backup))
    with pytest.raises(RuntimeError, match="backup must be contiguous uint8 of at least 192 bytes, got 100"):
        operators.perturb_(params, direction, backup[:100], epsilon, 1.0, True)
    if DEVICE != "cpu":
        return  # there the host cannot read whether it does
    with pytest.raises(RuntimeError, match="backup holds parameters already"):
        operators.perturb_(params, direction, backup, epsilon, 1.0, True)
    operators.perturb_restore_(params, backup)
    with pytest.raises(RuntimeError, match="backup is empty"):
        operators.perturb_(params, direction, backup, epsilon, 1.0, False)
