"""What is saved of a run: all that a step changes, and what a state file says of its run."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from config import SETTINGS
from harness.flags import wrong_setting
from losses import DinoLoss
from models import load_tensors

# ---------------------------------------------------------------- what a step changes


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards. A collective where it has any."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, each process its shard, in place."""
    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.to(target.device),
            target.device_mesh,
            target.placements,
            src_data_rank=None,  # all processes have the value: nothing is sent
        )
    target.copy_(value)


@dataclass(frozen=True)
class TrainingState:
    """All that a step changes: with the step's number, all that an exact resume needs."""

    system: nn.Module  # with .student and .teacher
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16's

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, the optimizer's by its parameter's name; sharded as it is."""
        names = {param: name for name, param in self.system.student.named_parameters()}
        tensors = {**self.system.state_dict(), "loss.center": self.loss.center}
        for param, values in self.optimizer.state.items():
            for key, value in values.items():
                tensors[f"optimizer.{names[param]}.{key}"] = value
        if self.scaler is not None:
            for key, number in self.scaler.state_dict().items():
                tensors[f"scaler.{key}"] = torch.tensor(number)
        return tensors

    def whole_tensors(self, keep: bool) -> dict[str, Tensor]:
        """Return `tensors` whole and on the CPU where `keep`, else nothing. A collective."""
        kept = {}
        for name, tensor in self.tensors().items():
            tensor = _whole(tensor)
            if keep:
                kept[name] = tensor.detach().cpu()
        return kept

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `whole_tensors` returned, in place.

        Raises ValueError where a tensor is missing; KeyError, AttributeError or RuntimeError for
        one that is another network's.
        """
        params = dict(self.system.student.named_parameters())
        own = {**self.system.state_dict(), "loss.center": self.loss.center}
        scaling = {}
        for name, value in tensors.items():
            part, rest = name.split(".", 1)
            if part == "scaler":
                scaling[rest] = value.item()
            elif part == "optimizer":
                param_name, key = rest.rsplit(".", 1)
                self._load_optimizer(params[param_name], key, value)
            else:
                _copy_into(own.pop(name), value)
        if own:
            raise ValueError(f"the saved state lacks {', '.join(list(own)[:3])}")
        if self.scaler is not None and scaling:  # none where fp16 was not the precision before
            self.scaler.load_state_dict(scaling)

    def _load_optimizer(self, param: Tensor, key: str, value: Tensor) -> None:
        if value.shape == param.shape:  # in the parameter's strides, which fused optimizers need
            target = torch.empty_like(param, dtype=value.dtype)
        else:  # the step's number, which torch keeps on the CPU unless the optimizer is fused
            is_fused = self.optimizer.param_groups[0].get("fused")
            target = torch.empty_like(value, device=param.device if is_fused else "cpu")
        _copy_into(target, value)
        self.optimizer.state[param][key] = target


# ---------------------------------------------------------------- what was saved

# what the metadata of a state must hold, and of which type
SAVED_TYPES = {"step": int, "metrics": dict, "config": dict, "world": int, "fingerprint": str}


def _is_of_a_run(metadata: object) -> bool:
    """Tell whether a state's metadata is what this version writes, by names, types and sizes."""
    if not isinstance(metadata, dict):
        return False
    if any(type(metadata.get(name)) is not kind for name, kind in SAVED_TYPES.items()):
        return False
    config, collapse = metadata["config"], metadata.get("collapse")
    has_known_settings = all(
        section in SETTINGS
        and isinstance(values, dict)
        and values.keys() <= SETTINGS[section].keys()
        for section, values in config.items()
    )
    if not has_known_settings or not isinstance(metadata.get("unreadable", []), list):
        return False
    if not isinstance(metadata.get("tracker_id", ""), str):
        return False
    if not all(type(value) in (int, float) for value in metadata["metrics"].values()):
        return False
    if collapse is not None and not (
        isinstance(collapse, dict) and {"kind", "since"} == set(collapse)
    ):
        return False
    if wrong_setting(config):
        return False
    optim = config.get("optim", {})
    factors = [optim.get("batch_size"), optim.get("accumulation_steps"), metadata["world"]]
    return metadata["step"] >= 0 and all(type(x) is int and x > 0 for x in factors)


@dataclass(frozen=True)
class SavedRun:
    """What a state file says of its run, apart from the tensors."""

    step: int = 0
    metrics: dict = field(default_factory=dict)  # of the last evaluation
    collapse: dict | None = None  # what the teacher had been since which step
    unreadable: tuple[int, ...] = ()  # images
    config: dict = field(default_factory=dict)  # as as_plain_data gave it
    world: int = 1  # processes
    fingerprint: str = ""  # of the images
    tracker_id: str = ""  # W&B's of the run

    @classmethod
    def read(cls, state_file: Path) -> "SavedRun":
        """Read a state file's metadata. ValueError where another version of this code wrote it."""
        _, texts = load_tensors(state_file, only_metadata=True)
        try:
            metadata = json.loads(texts.get("metadata", "{}"))
        except ValueError:
            metadata = None
        if not _is_of_a_run(metadata):
            text = f"cannot resume {state_file.parent}: {state_file} is damaged"
            raise ValueError(f"{text}, or another version of this code saved it")
        return cls(
            step=metadata["step"],
            metrics=metadata["metrics"],
            collapse=metadata.get("collapse"),
            unreadable=tuple(metadata.get("unreadable", ())),
            config=metadata["config"],
            world=metadata["world"],
            fingerprint=metadata["fingerprint"],
            tracker_id=metadata.get("tracker_id", ""),
        )

    @property
    def images_per_step(self) -> int:
        optim = self.config["optim"]
        return optim["batch_size"] * optim["accumulation_steps"] * self.world
