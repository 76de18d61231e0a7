"""Renders what is said of methods and families: pages in docs, the README's tables, those of accuracies and of vLLM.

    python tools/render_docs.py              # texts, and the pictures that are missing; every file appears whole
    python tools/render_docs.py --pictures   # every picture of what a method keeps, with `mini` (a minute)
    python tools/render_docs.py --check      # says which texts are out of date, writes nothing

Accuracies come from the newest benchmarks/results/accuracy-*.json, which `foveate eval --every` wrote.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate import methods
from foveate.core import Block, CacheBlock, FoveateError, Signals, described
from foveate.evaluate.catalogue import ACTS, about, at, describe
from foveate.evaluate.support_table import families_markdown, markdown
from foveate.families.rows import FAMILIES as FAMILY_ROWS
from foveate.runs import make_folder, write_bytes
from foveate.runtime.support import first_refused, why_not

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
KEPT = 144  # tokens in the pictures
QUESTION = "what color is behind the dog ?"
NOTHING = {"picture": "width and height of the picture"}  # what a method sees that reads no signal
MADE = "<!-- {name}: made by tools/render_docs.py -->", "<!-- /{name} -->"
ORDER = tuple(ACTS)

INTRO = """# Every method on `mini`

Share of {samples} questions about pictures that `mini` never saw, a fifth of each kind, answered right (descriptions:
share of what they should say), greedy, on a CPU. The command that made the numbers:

```text
{command}
```

Every method runs with its defaults and the budget of the column. A staged method keeps that many at every stage; beside
it stand its equivalent tokens, the tokens averaged over the decoder's layers: compare it with methods of that column.
`-` is a budget that a method cannot reach, with the reason below. Half of a 95 % interval is {interval} points at most.
Methods on the cache drop no visual tokens and are not here.

Read it with care: `mini` is small, and an even sample of a picture is good for counting. What a method looks at
decides: a digit is read off its own tag. Of one object its own tokens tell more than the whole picture, which is what a
method that reads the question can win; counts need the rest. The decoder is tuned to what LVPruning keeps
([how](../src/foveate/scenes/checkpoint/README.md)).
"""

FORMS = """
## Other forms

Fields with which methods run where an encoder has no CLS, is no CLIP, or has its patches joined: what they are worth on
`mini`, where the first form runs as well. The command:

```text
{command}
```

| method | all | existence | color | digit | count | describe |
|---|---:|---:|---:|---:|---:|---:|
{rows}
"""

METHODS = """# Methods

In the order in which a picture meets them. `foveate methods NAME` prints what its page says;
[families](families.md) has the models that a method runs on, [accuracy](accuracy.md) what they answer right on `mini`.

{methods}

They compose: a list in Python, `+` in a [spec](concepts.md#spec).
"""

FAMILIES = """# Model families

{families}

A model of another type gets a row made of the standard parts that it has, with a warning, or is refused with the part
that does not fit; `foveate check MODEL` says what works on any model, and tries it.

## Methods and families

`no` has its reason below the table, and a letter the settings with which a method runs all the same. Where a family
takes several encoders, the column is about its usual one.

{methods}

## Before the processor

`resize` scales the picture down to what its budget buys, where the table says `yes`: the largest picture of the same
proportions of which the processor makes no more tokens, bicubic, as if its user had scaled it. `foveate eval`, `run`
and `bench` do that, and `foveate.scale_down(model, processor, picture, keep)` in Python; `prune()` refuses it, since it
is given what the processor has made. How small a picture can be is the processor's affair: what is below its least is
refused with the nearest budget. Elsewhere the processor scales a small picture up again, to the encoder's one grid or
to tiles of one size, so that nothing would be saved.

## Before the encoder

A method before the encoder (`pixelprune`) sees the pixels of each token, and what it drops enters no block of the
encoder, nor the decoder, on every family but Gemma 4:

- The patches that stay have the embeddings and rotary angles of their own places and attend to each other and to CLS;
  windows, masks and bounds shrink with them. The embedding of a patch that leaves is computed and taken out before the
  first block. Tiles, frames and projectors that need whole pictures are as inside the encoder; a picture's tiles and
  the frames of a video are each looked at by themselves.
- Pixels are those that the encoder is given, in [0, 1] again by the mean and deviation in the files beside the
  checkpoint (`preprocessor_config.json`), else by those that encoders of its kind are trained with. Of the two frames
  that a still picture is given as, the first is looked at. Whole greys of 8 bits come back exactly, so that a threshold
  of four greys means four; in bfloat16 the brightest differ from the original by one.

## Inside the encoder

A method that acts inside the encoder (`tome`, `crossget`, `dynamicvit`, `image_text_interaction`) drops and merges
tokens as the decoder would get them, on every family but Gemma 4, whose encoder is only read:

- Where a projector joins neighbouring patches (2 x 2 merging, pixel shuffle, pooling), the patches of one token stay or
  leave together, and two tokens merge patch by patch. So `keep` is exact. What such a method reads of a token is the
  mean of its patches.
- Each tile of a picture, and each frame of a video, is encoded by itself. It gets its part of the picture's `keep` in
  proportion to its tokens, and keeps at least one. Patches of no token, such as padding, run along.
- What the projector needs in one piece is put back after the last block that it reads: a patch that left with its last
  hidden state, a merged one with its token's. Only then are the tokens that left taken out.
- Tokens that are interpolated between patches (pictures that LLaVA-OneVision scales down, and its videos) can leave,
  but not merge. Videos of Video-LLaVA have an encoder of their own, in which no method acts.
"""


def sees(needs: Iterable[str]) -> list[str]:
    """Signals in words."""
    found = []
    for need in needs:
        room, _, rest = need.partition(".")
        block, _, name = rest.rpartition(".") if room == "tower" else ("", "", rest or room)
        said = described({"tower": Block, "decoder": Block, "cache": CacheBlock}.get(room, Signals))[name].words
        if not said:  # a mask, which says what of another signal counts
            continue
        place = {"": "", "read": "the encoder block that the projector reads", "last": "the last encoder block"}
        where = place.get(block, f"encoder block {block.replace('/', ' of ')}")
        words = said + (f", {where}" if where else {"decoder": ", decoder", "cache": ", cache"}.get(room, ""))
        found.append(f"{words} (`{need}`)")
    return found


def page(name: str) -> str:
    """The Markdown page of one method."""
    row = describe(name)
    body, arguments = about(name)
    lines = [f"# `{name}`", "", row["keeps"][0].upper() + row["keeps"][1:], ""]
    facts = [
        ("paper", f"<{row['paper']}>" if row["paper"] else "none: a baseline"),
        ("acts", row["acts"]),
        ("sees", "; ".join(sees(row["needs"])) or NOTHING.get(row["site"], "nothing but the number of tokens")),
        ("in Python", f"`foveate.{row['class']}`"),
        (
            "follows released code",
            "with `official=true`" if row["official"] else "no switch: the default is all there is",
        ),
    ]
    if row["trained"]:
        facts.append(("weights", f"learned: `{name}:from=PATH`"))
    lines += ["| | |", "|---|---|", *(f"| {title} | {text} |" for title, text in facts), ""]
    if (PAGES / f"{name}.png").exists():
        lines += [f"![What {name} keeps of a scene]({name}.png)", ""]
        lines += [f'`{shown(name)}` on a scene, asked "{QUESTION}".', ""]
    lines += [body, ""] if body else []
    if arguments:
        lines += ["| field | default | |", "|---|---|---|"]
        for field, text in arguments.items():
            default = value(row["defaults"][field]) if field in row["defaults"] else "none: required"
            lines.append(f"| `{field}` | {default} | {text.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def value(default: Any) -> str:
    """A default as a spec writes it."""
    if isinstance(default, tuple):
        return "`" + "/".join(str(one) for one in default) + "`"
    return f"`{str(default).lower() if default is None or isinstance(default, bool) else default}`"


def ordered() -> list[dict[str, Any]]:
    """Every method, in the order in which a picture meets them."""
    return sorted((describe(name) for name in methods.names()), key=lambda row: (ORDER.index(first(row)), row["name"]))


def first(row: dict[str, Any]) -> str:
    """The site at which a method acts first."""
    site: str = row["site"].partition("+")[0]
    return site


def table(folder: str = "docs/methods") -> str:
    """The table of methods of a file beside which their pages lie in `folder`."""
    lines = ["| method | acts | keeps |", "|---|---|---|"]
    for row in ordered():
        name = f"[`{row['name']}`]({folder}/{row['name']}.md)"
        lines.append(f"| {name} | {row['acts']} | {row['keeps'].removeprefix('keeps ').removesuffix('.')} |")
    return "\n".join(lines)


def readme(text: str) -> str:
    """The README with its tables made anew."""
    tables = {"methods": table(), "families": families_markdown().strip()}
    return refilled(text, tables, "README.md")


def refilled(text: str, tables: dict[str, str], file: str) -> str:
    """A text with what stands between its marks made anew."""
    for name, made in tables.items():
        first, last = (mark.format(name=name) for mark in MADE)
        before, begin, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            sys.exit(f"{file} lacks {first} ... {last}")
        text = f"{before}{first}\n{made}\n{last}{after}"
    return text


def vllm_table() -> str:
    """What docs/vllm.md says of each family, by the rows and by what the tests of the plug-in run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from models.vllm_checkpoints import FAMILIES as TESTED

    from foveate.families.rows import FAMILIES as ROWS
    from foveate.serve.vllm.routes import routes_of, why_not

    sys.path.remove(str(ROOT / "tests"))
    lines = ["| family | runs | same answers as on transformers |", "|---|---|---|"]
    for row in ROWS:
        runs = " or ".join(routes_of(row.name)) or f"no: {why_not(row)}"
        tested = "-" if not routes_of(row.name) else "tested" if row.name in TESTED else "not tested"
        lines.append(f"| {row.name} | {runs} | {tested} |")
    return "\n".join(lines)


def accuracy(found: dict[str, Any]) -> str:
    """docs/accuracy.md from what `foveate eval --every` wrote."""
    budgets = found["every"]
    scores = {row["method"]: row for row in found["rows"]}
    none = scores["none"]
    intro = INTRO.format(samples=found["samples"], command=found["command"], interval=interval(none["samples"]))
    lines = [
        intro,
        f"| method | {' | '.join(map(str, budgets))} |",
        "|---|" + "---:|" * len(budgets),
        f"| all 576 tokens | {' | '.join([percent(none)] * len(budgets))} |",
    ]
    for row in found["rows"]:
        if row["method"].startswith("ceiling"):
            tokens = f"about {row['tokens']:.0f} tokens"
            lines.append(f"| those of the object asked about, {tokens} | {' | '.join([percent(row)] * len(budgets))} |")
    named = [row["name"] for row in ordered() if row["site"] != "cache"]
    for name in named:
        cells = [measured(scores, name, keep) for keep in budgets]
        lines.append(f"| [`{name}`](methods/{name}.md) | {' | '.join(cells)} |")
    lines += ["", "What could not be reached:", ""]
    reasons = {name: why for name in named if (why := never(name, budgets)) is not None}
    for entry in found["unreached"]:
        if entry["method"] in named and entry["method"] not in reasons:
            lines.append(f"- `{entry['method']}` at {', '.join(map(str, entry['keep']))}: {entry['why']}")
    lines += [f"- `{name}` at any: {why}" for name, why in reasons.items()]
    lines += [line for note in found.get("notes", []) for line in ("", note)]
    return "\n".join(lines) + "\n"


def never(name: str, budgets: Iterable[int]) -> str | None:
    """Why no budget of a method can be measured on `mini`; None where one can."""
    reasons = []
    for keep in budgets:
        try:
            parts = budgeted(name, keep).parts()
        except FoveateError as error:
            reasons.append(str(error))
            continue
        family = next(one for one in FAMILY_ROWS if AutoConfig.from_pretrained(foveate.MINI).model_type in one.types)
        refused = first_refused(parts, family, family.described(family.towers[0]))
        if refused is None:
            return None
        reasons.append(f"it {why_not(refused, family, family.described(family.towers[0]))}")
    return reasons[0]


def measured(scores: dict[str, Any], name: str, keep: int) -> str:
    """The accuracy of a method at a budget; `-` where it cannot be reached or was not measured yet."""
    try:
        row = scores.get(str(budgeted(name, keep)))
    except FoveateError:
        return "-"
    return "-" if row is None else cell(row)


def forms(found: dict[str, Any]) -> str:
    """The part of docs/accuracy.md about forms of methods, from what `foveate eval` wrote."""
    kinds = ("existence", "color", "digit", "count", "describe")
    lines = []
    for row in found["rows"]:
        values = [percent(row), *(f"{100 * row[kind]:.0f}" for kind in kinds)]
        name = "all 576 tokens" if row["method"] == "none" else f"`{row['method']}`"
        lines.append(f"| {name} | {' | '.join(values)} |")
    return FORMS.format(command=found["command"], rows="\n".join(lines))


def families() -> str:
    """docs/families.md: what is known of each family, and which method runs on it."""
    return FAMILIES.format(families=families_markdown().strip(), methods=markdown().strip())


def interval(samples: int) -> str:
    """Half of the widest 95 % interval of a share of so many answers, in points."""
    return f"{196 * (0.25 / samples) ** 0.5:.1f}"


def percent(row: dict[str, Any]) -> str:
    """The accuracy of a row."""
    return f"{100 * row['accuracy']:.1f}"


def cell(row: dict[str, Any]) -> str:
    """Accuracy, and the equivalent tokens where they differ from the tokens that are left."""
    same = abs(row["equivalent_tokens"] - row["tokens"]) < 0.5
    return percent(row) if same else f"{percent(row)} ({row['equivalent_tokens']:.0f})"


def front(text: str) -> str:
    """The package's front with the imports of every method, which type checkers read, made anew."""
    kinds = [(name, methods.get(name).__name__) for name in methods.names()]
    lines = [f"    from foveate.methods.{name} import {kind} as {kind}\n" for name, kind in kinds]
    return re.sub(r"(?:    from foveate\.methods\..*\n)+", "".join(lines), text, count=1)


def texts() -> dict[Path, str]:
    """Every text, by its file."""
    found = {PAGES / f"{name}.md": page(name) for name in methods.names()}
    path = ROOT / "src" / "foveate" / "__init__.py"
    found[path] = front(path.read_text(encoding="utf-8"))
    path = ROOT / "README.md"
    found[path] = readme(path.read_text(encoding="utf-8"))
    found[ROOT / "docs" / "families.md"] = families()
    found[ROOT / "docs" / "methods.md"] = METHODS.format(methods=table("methods"))
    path = ROOT / "docs" / "vllm.md"
    found[path] = refilled(path.read_text(encoding="utf-8"), {"families": vllm_table()}, "docs/vllm.md")
    files = ((accuracy, latest("accuracy")), (forms, latest("forms")))
    made = [make(json.loads(file.read_text(encoding="utf-8"))) for make, file in files if file]
    if made:
        found[ROOT / "docs" / "accuracy.md"] = "".join(made)
    return found


def latest(name: str) -> Path | None:
    """The newest result of a name."""
    return max((ROOT / "benchmarks" / "results").glob(f"{name}-*.json"), default=None)


def shown(name: str) -> str:
    """The method as the pictures show it; nothing for one that drops none of the tokens that a whole picture has, or
    that has no weights for `mini`."""
    if describe(name)["site"] == "picture":
        return ""
    try:
        return str(budgeted(name, KEPT))
    except FoveateError:
        return ""


def budgeted(name: str, keep: int) -> Any:
    """The method at a budget, with the weights that `mini` has for it."""
    weights = "mini" if (Path(foveate.MINI) / name).is_dir() else None
    method = at(name, keep, 576, weights)
    for part in method.parts():
        part.check_model(AutoConfig.from_pretrained(foveate.MINI))
    return method


def write(path: Path, data: bytes) -> None:
    """Write a file, and the folder that it is in."""
    make_folder(path.parent)
    write_bytes(path, data)


def undrawn() -> list[str]:
    """Methods that can be drawn and have no picture yet."""
    return [name for name in methods.names() if shown(name) and not (PAGES / f"{name}.png").exists()]


def pictures(names: Iterable[str]) -> None:
    """What methods keep of the demo scene, as small pictures."""
    from foveate.inference.answers import encode, greedy
    from foveate.scenes.generator import demo

    model = AutoModelForImageTextToText.from_pretrained(foveate.MINI)
    processor = AutoProcessor.from_pretrained(foveate.MINI)
    image = demo().image(0)
    inputs = encode(model, processor, [[image]], [QUESTION])
    for name in names:
        if not shown(name):
            continue
        with foveate.prune(model, shown(name), processor=processor) as trace:
            greedy(model, inputs, max_new_tokens=1)
        small = foveate.draw(image, trace).quantize(96, dither=Image.Dither.NONE)
        data = io.BytesIO()
        small.save(data, format="PNG", optimize=True)
        write(PAGES / f"{name}.png", data.getvalue())
        print(name)


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures", action="store_true", help="draw every picture anew, not only those that are missing"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a text is out of date")
    options = parser.parse_args()
    wanted = methods.names() if options.pictures else [] if options.check else undrawn()
    if wanted:
        pictures(wanted)
    old = [path for path, text in texts().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if options.check:
        if old:
            sys.exit("out of date: " + ", ".join(str(path.relative_to(ROOT)) for path in old))
        return
    for path, text in texts().items():
        if path in old:
            write(path, text.encode())


if __name__ == "__main__":
    main()
