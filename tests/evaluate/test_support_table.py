"""The table of methods and families."""

from __future__ import annotations

from foveate import methods
from foveate.evaluate.support_table import families_markdown, markdown, support
from foveate.families.rows import FAMILIES


def test_every_method_on_every_family() -> None:
    rows = support()
    assert [row.method for row in rows] == list(methods.names())
    assert all(list(row.reasons) == [family.name for family in FAMILIES] for row in rows)


def test_what_runs_and_what_does_not() -> None:
    found = {row.method: row.reasons for row in support()}
    closed = [family.name for family in FAMILIES if family.closed_decoder is not None]
    assert [name for name, reason in found["fastv"].items() if reason is not None] == closed
    assert found["tome"]["llava-1.5"] is None
    assert found["tome"]["paligemma"] is None
    closed = [family.name for family in FAMILIES if family.closed_encoder is not None]
    assert [name for name, reason in found["tome"].items() if reason is not None] == closed
    assert found["crossget"]["qwen2-vl"] == (
        "needs tower.latest.cross, tower.latest.cross_attention, which qwen2-vl with qwen2_vl_vision does not have"
    )
    assert found["fastervlm"]["internvl"] is None
    assert found["fastervlm"]["gemma3"] == (
        "needs tower.read.cls_attention, which gemma3 with siglip_vision_model does not have (with attention=received "
        "it runs)"
    )
    settings = {row.method: row.settings for row in support()}
    assert settings["fastervlm"]["gemma3"] == "attention=received"
    assert settings["visionzip"]["internvl"] == "attention=received,space=projected"
    assert settings["prumerge"]["internvl"] == "space=projected"
    assert settings["trim"]["vipllava"] == settings["eadp"]["qwen3-vl"] == "space=decoder"
    assert settings["crossget"]["qwen2-vl"] is None


def test_the_families() -> None:
    lines = families_markdown().splitlines()
    assert len(lines) == 2 + len(FAMILIES)
    for family, line in zip(FAMILIES, lines[2:], strict=True):
        assert line.startswith(f"| {family.name} | `{family.hub_ids[0]}`")
        assert (" | yes | " in line) == (family.videos is not None or family.frames)
        assert (" | yes | " in line) == ("video" in family.image)
        assert f"| {family.image} |" in line


def test_the_table_names_each_reason_once() -> None:
    text = markdown()
    table, settings, reasons = text.split("\n\n", 2)
    lines = table.splitlines()
    assert len(lines) == 2 + len(methods.names())
    assert lines[0].startswith("| method | llava-1.5 | llava-next |")
    (fastv,) = (line for line in lines if line.startswith("| `fastv` |"))
    assert fastv.count(" yes |") == sum(family.closed_decoder is None for family in FAMILIES)
    numbered = reasons.strip().splitlines()
    assert [line.split(".")[0] for line in numbered] == [str(number + 1) for number in range(len(numbered))]
    assert len(set(numbered)) == len(numbered)
    assert all(f"no ({number + 1})" in table for number in range(len(numbered)))
    lettered = settings.splitlines()
    assert [line[:3] for line in lettered] == ["a) ", "b) ", "c) ", "d) "]
    assert all(f"| {line[:2]} |" in table for line in lettered)
