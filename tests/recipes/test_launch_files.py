"""Every launch file is one that accelerate takes, and the CPU's starts two processes that equal one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from recipes.launch_layouts import LAUNCH_FILES, LAYOUTS, check_processes, read_launch_file

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(LAUNCH_FILES.glob("*.yaml"))


def test_every_layout_has_its_file():
    assert {path.stem for path in FILES} == set(LAYOUTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_takes_the_file(path, monkeypatch):
    """The launcher's own reading, with every nested key one that it knows."""
    config = read_launch_file(path)
    parser = launch_command_parser()
    known = set(vars(parser.parse_args(["script.py"])))
    for group in (config.fsdp_config, config.deepspeed_config, config.parallelism_config):
        assert set(group) <= known
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))
    name = path.stem
    assert args.use_fsdp == (name in ("fsdp2", "fsdp2_kept", "fsdp2_checkpointing", "fsdp2_ep", "context_parallel",
                                       "several_nodes"))
    assert args.use_deepspeed == name.startswith("zero") == LAYOUTS[name].deepspeed
    assert args.mixed_precision == "no" and args.num_processes == config.num_processes
    if args.use_fsdp:
        kept = args.fsdp_reshard_after_forward in ("false", False)
        assert kept == LAYOUTS[name].keeps
        assert args.fsdp_version == 2 and args.fsdp_offload_params == LAYOUTS[name].offloads
    if name == "context_parallel":
        sizes = [getattr(args, f"parallelism_config_{part}_size") for part in ("dp_replicate", "dp_shard", "tp", "cp")]
        assert args.use_parallelism_config and sizes[3] == LAYOUTS[name].group
        assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == args.num_processes


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_says_what_it_costs_and_how_to_run_it(path):
    text = path.read_text()
    for word in ("# When:", "# Memory:", "ommunication:"):
        assert word in text, word
    for command in re.findall(r"accelerate launch --config_file (\S+)", text):
        assert (ROOT / command).is_file()
    for config in re.findall(r"--config (\S+)", text):
        assert (ROOT / config).is_file()


@pytest.mark.parametrize("path", [path for path in FILES if read_launch_file(path).fsdp_config], ids=lambda p: p.stem)
def test_files_name_no_layer_classes(path):
    """accelerate would refuse any model that lacks one of them: ours without multi-token prediction, other families.
    Our models are sharded by recipes/sharding.py, others by the classes that they name themselves."""
    config = read_launch_file(path).fsdp_config
    assert "fsdp_transformer_layer_cls_to_wrap" not in config
    # The first process cannot read the experts that only others have.
    assert config["fsdp_cpu_ram_efficient_loading"] == (path.stem != "fsdp2_ep")


def test_more_processes_than_gpus():
    ddp = LAYOUTS["ddp"].file
    with pytest.raises(ValueError, match="num_processes=8 of .*there are 2 GPUs; add --num_processes 2"):
        check_processes(ddp, 2)
    with pytest.raises(ValueError, match="0 GPUs; use recipes/launch/cpu.yaml"):
        check_processes(ddp, 0)
    with pytest.raises(ValueError, match="num_machines=2 of .*nodes=1; add --nodes 2"):
        check_processes(LAYOUTS["several_nodes"].file, 16)
    check_processes(ddp, 8)
    check_processes(LAYOUTS["cpu"].file, 0)


def test_a_file_that_accelerate_refuses(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_gpus: 2\n")
    with pytest.raises(ValueError, match="odd.yaml' is not a file that accelerate launch takes.*num_gpus"):
        read_launch_file(path)
    with pytest.raises(ValueError, match="no such file"):
        read_launch_file(tmp_path / "none.yaml")


SLURM = LAUNCH_FILES / "several_nodes.slurm"


def test_slurm_script_launches_one_command_a_node(tmp_path):
    """Run by bash with stand-ins for what Slurm and accelerate put in the path."""
    tools = {
        "scontrol": 'printf "first\\nsecond\\n"', "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        "accelerate": 'printf "%s\\n" "$@"',
    }  # fmt: skip
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]",
                   "SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip
    run = subprocess.run(["bash", str(SLURM), "recipes/pretrain.py", "--config", "a b.yaml"], env=environment,
                         capture_output=True, text=True, check=True)  # fmt: skip
    parts = run.stdout.split("\n")[:-1]
    args = launch_command_parser().parse_args(parts[1:])
    assert parts[0] == "launch" and args.num_machines == 2 and args.num_processes == 8 and args.machine_rank == 1
    assert args.main_process_ip == "first" and args.main_process_port == 29505 and args.rdzv_backend == "static"
    assert args.training_script_args == ["--config", "a b.yaml"]
    none = subprocess.run(["bash", str(SLURM)], env=environment, capture_output=True, text=True)
    assert none.returncode == 2 and "usage" in none.stderr


TRAIN = """
import sys, json
sys.path.insert(0, {root!r})
from tests.recipes.tiny_run import losses, tiny_trainer
trainer = tiny_trainer({folder!r}, per_device_train_batch_size={rows}, max_steps=3, eval_strategy="no", save_steps=100)
trainer.train()
if trainer.accelerator.is_main_process:
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {{name: weight.double().sum().item() for name, weight in model.named_parameters()}}
    json.dump([trainer.args.world_size, losses({folder!r}), weights], open({folder!r} + "/result.json", "w"))
"""


@pytest.mark.slow
def test_two_cpu_processes_equal_one(tmp_path):
    results = []
    for name, rows, launcher in (
        ("one", 4, []),
        ("two", 2, ["-m", "accelerate.commands.launch", "--config_file", str(LAYOUTS["cpu"].file),
                    "--main_process_port", "0"]),
    ):  # fmt: skip
        script = tmp_path / f"{name}.py"
        script.write_text(TRAIN.format(root=str(ROOT), folder=str(tmp_path / name), rows=rows))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, str(script)], check=True, env=environment, cwd=ROOT, timeout=170)
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    (one, curve, weights), (two, curve_of_two, weights_of_two) = results
    assert (one, two) == (1, 2) and len(curve) == 3
    assert list(curve.values()) == pytest.approx(list(curve_of_two.values()), rel=1e-5)
    assert weights == pytest.approx(weights_of_two, rel=1e-4, abs=1e-4)
