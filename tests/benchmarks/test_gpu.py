"""The GPU benchmark where there is no GPU."""

from click.testing import CliRunner

from benchmarks import gpu


def test_without_a_gpu_it_says_so_and_measures_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu.main, ["--json", str(tmp_path / "gpu.json")])
    assert result.exit_code == 0
    assert result.output == "No CUDA device here: nothing was measured.\n"
    assert not list(tmp_path.iterdir())
