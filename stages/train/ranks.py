"""One accelerate ``Accelerator`` for a run, and the proof that what was launched is what was asked for.

Non-obvious:
- ``accelerate launch --cpu --num_processes 2`` starts one process and says nothing.
- With FSDP's environment on a CPU accelerate trains plain DDP and says nothing.
- DeepSpeed's ``bf16``, which accelerate switches on, casts every weight; its ``torch_autocast`` keeps them float32.
- FSDP2's default under bf16 casts weights and inputs of every wrapped module, the head's too: switched off here, the
  VLM's precision comes from autocast as everywhere.
"""

import importlib.util
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from geomcache.cache_schemas.errors import ConfigError, InputError, MissingDependency
from geomcache.pipeline.devices import resolve_device
from geomcache.stages.train.config import TrainConfig

_TYPES = {
    "ddp": (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU),
    "fsdp2": (DistributedType.FSDP,),
    "zero2": (DistributedType.DEEPSPEED,),
}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Built here and not at import; what kind of ranks there are comes from the environment of the launch.

    Raises:
        InputError: another number of ranks, or another kind of them, than configured.
    """
    device = resolve_device(config.device)
    if config.strategy != "ddp" and device == "cpu":
        raise ConfigError(
            f"strategy {config.strategy} needs GPUs",
            expected="ddp on a CPU",
            found=config.strategy,
            fix="--set strategy=ddp",
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and here > torch.cuda.device_count():
        raise InputError(
            "there are fewer GPUs here than processes",
            expected=f"{here} GPUs",
            found=str(torch.cuda.device_count()),
            fix=f"--processes {torch.cuda.device_count()}",
        )
    options: dict[str, Any] = {}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and device != "cpu":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and importlib.util.find_spec("deepspeed") is None:
        raise MissingDependency("strategy zero2 needs DeepSpeed", fix="pip install deepspeed")
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(config.trackers) or None,
        # while rank 0 writes a large checkpoint the others wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        project_config=ProjectConfiguration(
            project_dir=str(config.out), logging_dir=str(config.out / "tensorboard"), automatic_checkpoint_naming=False
        ),
        **options,
    )
    # the launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win over the argument
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    _require_launch(config, accelerator)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.gradient_clip,
            "zero_allow_untested_optimizer": True,  # torch's AdamW
            "bf16": {"enabled": False},
            "torch_autocast": {"enabled": config.mixed_precision == "bf16", "dtype": "bfloat16"},
        }
    return accelerator


def _require_launch(config: TrainConfig, accelerator: Accelerator) -> None:
    fix = f"geomcache train --processes {config.processes} ..., which starts them itself"
    if accelerator.num_processes != config.processes:
        raise InputError(
            "training was launched with another number of processes than configured",
            expected=f"{config.processes} (processes)",
            found=f"{accelerator.num_processes} running",
            fix=fix,
        )
    found = accelerator.distributed_type
    plain = found == DistributedType.NO and config.processes == 1 and config.strategy == "ddp"
    if not plain and found not in _TYPES[config.strategy]:
        raise ConfigError(
            f"ranks were launched for another strategy than {config.strategy}",
            expected=" or ".join(kind.value for kind in _TYPES[config.strategy]),
            found=found.value,
            fix=fix,
        )
