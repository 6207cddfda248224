from pathlib import Path

import pytest
from assignment_toys import cuda_session, model_with_a_dynamic_shape
from export_toys import toy
from quantise_toys import labelled_images, small_onnx

from export.conversion.fp16 import to_fp16
from export.conversion.int8 import Int8Config, collect_ranges
from export.conversion.session import CUDA, check_provider, cuda_works, instruction_set, open_session, read_model
from ltkd.contract.resources import num_cores
from ltkd.errors import BundleError, DeviceError

WITHOUT_CUDA = pytest.mark.skipif(cuda_works(), reason="CUDA works here")
WITH_CUDA = pytest.mark.skipif(not cuda_works(), reason="CUDA does not work here")


def test_a_session_has_one_thread_per_available_core() -> None:
    assert open_session(toy().candidate).get_session_options().intra_op_num_threads == num_cores()


def test_every_precision_uses_standard_operators_and_passes_the_checker() -> None:
    int8 = collect_ranges(small_onnx(), labelled_images(30, seed=2).images[:]).to_onnx_bytes(
        Int8Config("minmax", per_channel=True)
    )
    for content in (small_onnx(), to_fp16(small_onnx()), int8):
        assert {opset.domain for opset in read_model(content).opset_import} == {""}


@WITHOUT_CUDA
def test_if_cuda_does_not_work_the_error_lists_its_requirements(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeviceError, match=r"asked for CUDAExecutionProvider, .* It needs an NVIDIA GPU"):
        open_session(toy().candidate, CUDA)
    assert capfd.readouterr() == ("", "")


@WITHOUT_CUDA
def test_an_invalid_file_is_not_reported_as_an_error_of_the_device() -> None:
    with pytest.raises(BundleError, match="cannot open the model"):
        open_session(b"no model", CUDA)


@WITH_CUDA
def test_on_cuda_every_node_runs_there_with_and_without_tf32() -> None:
    for tf32 in (False, True):
        session = open_session(to_fp16(small_onnx()), CUDA, tf32=tf32)
        assert {assigned.ep_name for assigned in session.get_provider_graph_assignment_info()} == {CUDA}
        assert session.get_provider_options()[CUDA]["use_tf32"] == str(int(tf32))


def test_on_cuda_shapes_may_be_computed_on_the_cpu_and_the_image_may_not() -> None:
    content = model_with_a_dynamic_shape().SerializeToString()
    check_provider(cuda_session(content, on_cpu={"Gather", "Slice", "Concat"}), CUDA, content)
    for operator in ("Relu", "MatMul", "Cast"):
        with pytest.raises(DeviceError, match=rf"asked for CUDAExecutionProvider, but 1 of 8 .*\({operator}\)"):
            check_provider(cuda_session(content, on_cpu={operator, "Slice"}), CUDA, content)


@WITH_CUDA
def test_a_model_with_a_dynamic_shape_opens_on_cuda() -> None:
    open_session(model_with_a_dynamic_shape().SerializeToString(), CUDA)


def test_an_unknown_provider_is_rejected() -> None:
    with pytest.raises(DeviceError, match="the provider 'TPUExecutionProvider' is not supported"):
        open_session(toy().candidate, "TPUExecutionProvider")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu sse2 avx avx2 fma", "avx2"),
        ("flags\t\t: avx2 avx_vnni", "avx_vnni"),
        ("flags\t\t: avx2 avx512f avx512bw avx512vl", "avx512"),
        ("flags\t\t: avx2 avx512f avx512bw avx512_vnni", "avx512_vnni"),
        ("Features\t: fp asimd asimddp", "dotprod"),
        ("Features\t: fp asimd asimddp i8mm", "i8mm"),
        ("flags\t\t: fpu sse2", "unknown"),
    ],
)
def test_the_instruction_set_is_read_from_the_kernel(tmp_path: Path, line: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: some avx512_vnni processor\n{line}\nbugs\t\t:\n")
    assert instruction_set(cpuinfo) == expected


def test_without_cpuinfo_the_instruction_set_is_unknown(tmp_path: Path) -> None:
    assert instruction_set(tmp_path / "missing") == "unknown"
