"""service/settings.py: what the environment may say."""

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from service.settings import PROJECT_ROOT, Settings, SettingsError


def test_nothing_set_is_all_defaults() -> None:
    settings = Settings.from_environment({"PATH": "/bin", "BENTOML_HOME": "x"})
    assert settings == Settings()
    assert settings.models_dir == PROJECT_ROOT / "models"


def test_values_are_read_and_frozen() -> None:
    settings = Settings.from_environment(
        {"PARCHGRAD_MAX_IMAGES": "3", "PARCHGRAD_MODEL": "resnet18/2", "PARCHGRAD_MAX_DELAY_MS": "1.5",
         "PARCHGRAD_MODELS_DIR": "/there", "PARCHGRAD_TABLES_DIR": "here", "PARCHGRAD_DEVICE": "cuda:1"}
    )  # fmt: skip
    assert (settings.max_images, settings.model, settings.max_delay_ms) == (3, "resnet18/2", 1.5)
    assert (settings.models_dir, settings.tables_dir) == (Path("/there"), PROJECT_ROOT / "here")
    with pytest.raises(FrozenInstanceError):
        settings.max_images = 4  # type: ignore[misc]


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_booleans(text: str, value: bool) -> None:
    assert Settings.from_environment({"PARCHGRAD_SELF_TEST": text}).self_test is value


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SELF_TEST", "yes", "PARCHGRAD_SELF_TEST='yes': expected true, false, 1 or 0."),
        ("SELF_TEST", "True", "PARCHGRAD_SELF_TEST='True': expected true, false, 1 or 0."),
        ("MAX_IMAGES", "0", "PARCHGRAD_MAX_IMAGES='0': expected an integer from 1 to 1000."),
        ("MAX_IMAGES", "3.5", "PARCHGRAD_MAX_IMAGES='3.5': expected an integer from 1 to 1000."),
        ("MAX_DELAY_MS", "nan", "PARCHGRAD_MAX_DELAY_MS='nan': expected a number from 0.0 to 1000.0."),
        ("MODEL", "../x", "PARCHGRAD_MODEL='../x': expected NAME or NAME/VERSION."),
        ("RUNTIME", "tensorrt", "PARCHGRAD_RUNTIME='tensorrt': expected auto, torch or onnx."),
        ("GRAPHS_DIR", "", "PARCHGRAD_GRAPHS_DIR='': expected a folder."),
        ("DEVICE", "gpu", "PARCHGRAD_DEVICE='gpu': expected cpu, cuda or cuda:N."),
        ("MODELS_DIR", "", "PARCHGRAD_MODELS_DIR='': expected a folder."),
        ("TIMEOUT_MS", "130000", "PARCHGRAD_TIMEOUT_MS='130000': expected at most PARCHGRAD_MAX_TIMEOUT_MS=120000."),
        ("SHED_ABOVE", "9999", "PARCHGRAD_SHED_ABOVE='9999': expected at most PARCHGRAD_MAX_QUEUE=256."),
        (
            "DIGESTS",
            "tiny:aa",
            "PARCHGRAD_DIGESTS='tiny:aa': expected "
            "NAME/VERSION:WEIGHTS_SHA256[:TABLE_SHA256[:GRAPH_SHA256]], comma-separated.",
        ),
        ("DIGESTS", f"a/1:{'0' * 64},a/1:{'1' * 64}", "PARCHGRAD_DIGESTS='a/1': expected one entry for a version."),
        ("MAX_QUEUE", "4", "PARCHGRAD_MAX_QUEUE='4': expected at least PARCHGRAD_MAX_IMAGES=16."),
    ],
)
def test_errors_name_variable_value_and_allowed(variable: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({f"PARCHGRAD_{variable}": value})
    assert str(caught.value) == message


def test_a_variable_that_is_no_setting_is_refused() -> None:
    message = "PARCHGRAD_MAX_QUEU='3': expected one of the settings PARCHGRAD_ADMIN_KEYS, .*; did you mean {}"
    with pytest.raises(SettingsError, match=message.format(r"PARCHGRAD_MAX_QUEUE\?$")):
        Settings.from_environment({"PARCHGRAD_MAX_QUEU": "3"})
    with pytest.raises(SettingsError, match=r"PARCHGRAD_WORKERS\.$"):  # nothing is near it
        Settings.from_environment({"PARCHGRAD_TYPO": "3"})


def test_digests_of_a_version() -> None:
    text = f"a/1:{'0' * 64},b/12:{'1' * 64}:{'2' * 64},c/1:{'3' * 64}:{'4' * 64}:{'5' * 64}"
    settings = Settings.from_environment({"PARCHGRAD_DIGESTS": text})
    assert settings.digests_of("a", "1") == {"weights": "0" * 64}
    assert settings.digests_of("b", "12") == {"weights": "1" * 64, "table": "2" * 64}
    assert settings.digests_of("c", "1") == {"weights": "3" * 64, "table": "4" * 64, "graph": "5" * 64}
    assert settings.digests_of("b", "1") is None


def test_shed_above_the_whole_queue_is_allowed() -> None:
    assert Settings.from_environment({"PARCHGRAD_SHED_ABOVE": "256"}).shed_bound == 256


def test_every_model_is_each_folder_that_holds_a_version(tmp_path: Path) -> None:
    for folder in ("a/1", "b/2", "c/notes", ".adding/1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text("no model")
    settings = Settings(models_dir=tmp_path, graphs_dir=tmp_path / "graphs", model="b", models="*")
    assert settings.entries == [("b", None), ("a", None)]


def test_every_setting_says_what_it_is() -> None:
    assert all(field.metadata["help"] for field in fields(Settings))
