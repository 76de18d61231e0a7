"""The files for several GPUs: what accelerate reads in them, and that they name modules that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.modules import lvpruning

pytest.importorskip("accelerate")
FOLDER = Path(__file__).parents[2] / "examples" / "lvpruning"


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_accelerate_reads_the_file(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, 8, "bf16")
    options = getattr(config, f"{name}_config")
    assert options, "an option that accelerate does not know would have been refused"


def test_accelerate_launch_understands_every_option() -> None:
    """Each entry becomes an argument of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    from accelerate.commands.config.config_args import load_config_from_file

    for name in ("fsdp", "deepspeed"):
        options = getattr(load_config_from_file(str(FOLDER / f"{name}.yaml")), f"{name}_config")
        assert set(options) <= known


def test_what_is_sharded_is_a_module() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    options = load_config_from_file(str(FOLDER / "fsdp.yaml")).fsdp_config
    assert hasattr(lvpruning, options["fsdp_transformer_layer_cls_to_wrap"])
