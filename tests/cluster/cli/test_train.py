"""`outrider train` on a tiny target: what it prints, and what lies in its folder afterwards."""

from pathlib import Path

from typer.testing import CliRunner

from outrider.cluster.cli.main import app
from outrider.configs.loader import config_to_yaml
from support.training import tiny_run, write_texts


def test_train_says_how_it_goes_and_leaves_a_drafter_and_its_curves(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    path, out = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(config_to_yaml(tiny_run(tmp_path / "texts", out, steps=4)))
    result = CliRunner().invoke(app, ["train", str(path), "eval_every=2", "checkpoint_every=2"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "10 texts of 180 tokens, 10 held out"
    assert any(line.startswith("hidden rows of 360 tokens: ") for line in lines)
    assert [line.split(":")[0].split(",")[0] for line in lines if line.startswith("step")] == [
        "step 1", "step 2", "step 2", "step 3", "step 4", "step 4",
    ]  # fmt: skip
    assert "tokens per round of a chain on the held-out texts: " in lines[-1]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (out / "drafter").iterdir()} == {
        "config.json", "model.safetensors", "provenance.json",
    }  # fmt: skip
    again = CliRunner().invoke(app, ["train", str(path)])
    assert again.exit_code == 0
    assert "step" not in again.stdout  # it was finished
    assert again.stdout.splitlines()[-1] == lines[-1]


def test_a_recipe_that_does_not_exist() -> None:
    result = CliRunner().invoke(app, ["train", "smollm2-eagle"])
    assert result.exit_code == 2
    assert "did you mean smollm2-eagle3?" in result.output
