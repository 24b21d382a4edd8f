"""Weights as other projects write them: which tensors are a backbone's, by which names.

A checkpoint of another project is a dict within dicts, of one network or of two, with the names of
wrappers before its keys, and with heads, decoders and queues beside the backbone. The tables below
say what is known of them; the names are facts of the projects' code. What is left then has the
names of timm or torchvision, or timm's own conversion makes them.
"""

import contextlib
import inspect
import io
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Role = Literal["teacher", "student"]  # which of a file's two networks

# dicts that hold a state dict, an average of the weights before the weights, as timm takes them
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# parts of a key that DDP, FSDP, torch.compile and DeepSpeed add, at its beginning or after a dot:
# (?<![^.]) stands for both
WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)\."
)

# two networks in one state dict: what is before the keys of the teacher, and of the student
NETWORKS = (
    ("teacher.", "student."),  # DINO, DINOv2, DINOv3, iBOT
    ("teacher_backbone.", "student_backbone."),  # lightly
    ("momentum_backbone.", "backbone."),  # solo-learn
    ("backbone_momentum.", "backbone."),  # lightly's MoCo and BYOL
    ("momentum_encoder.", "base_encoder."),  # MoCo v3
    ("encoder_k.", "encoder_q."),  # MoCo v1 and v2
)

# what is before all keys of a network that is an attribute of another module
PREFIXES = ("backbone.", "model.", "encoder.", "net.", "vit.", "trunk.")

# first parts of keys that are no part of a backbone
NO_BACKBONE = frozenset(
    """
    mask_token masked_embed
    decoder decoder_embed decoder_pos_embed decoder_blocks decoder_norm decoder_pred
    dino_head ibot_head student_head teacher_head student_ibot_head teacher_ibot_head
    student_projection_head teacher_projection_head projection_head_momentum prediction_head
    momentum_head projector momentum_projector predictor momentum_predictor
    classifier momentum_classifier online_classifier linear online_linear
    queue queue_ptr prototypes memory_bank center
    """.split()
)
LOSSES = re.compile(r"\w*(?:criterion|loss|loss_func)\.")  # with their centers
# MLPs that MoCo has in place of a classifier, and the projection heads of lightly
MLP_HEADS = re.compile(r"(?:fc|head)\.\d+\.[a-z_]+$|projection_head\.layers\.")
# what iBOT's head has for patches beside the layers for images
PATCH_HEAD = ("last_layer2.", "mlp2.", "last_norm.", "last_norm2.")

# a ResNet of torchvision as a Sequential of its children (lightly); 2 and 3 have no weights
RESNET_CHILDREN = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}


class Found(NamedTuple):
    """A network's tensors, and lines that say what was chosen and left out."""

    tensors: Tensors
    notes: list[str]


def open_containers(content: dict, role: Role) -> tuple[dict, list[str]]:
    """Return the innermost dict of a file's content that is to hold tensors, and lines that say it.

    Raises ValueError where it holds the other network alone.
    """
    notes: list[str] = []
    for _ in range(4):  # a pickle may hold itself
        dicts = [name for name, value in content.items() if isinstance(value, dict) and value]
        networks = [name for name in ("teacher", "student") if name in dicts]
        names = [name for name in CONTAINERS if name in dicts]
        if role in networks:
            content = content[role]
        elif networks:
            raise ValueError(f"holds no {role}, but {', '.join(networks)}")
        elif names:
            if len(names) > 1:
                notes.append(f"of {', '.join(names)} the first is taken")
            content = content[names[0]]
        else:
            break
    return content, notes


def find_network(tensors: Tensors, role: Role) -> Found:
    """Return one network of a state dict, as `peel` leaves it.

    Where `head.` or `projection_head.` are beside it, its keys still begin with `backbone.`. Raises
    ValueError where the state dict holds the other network alone.
    """
    tensors = _renamed(tensors, {key: WRAPPERS.sub("", key) for key in tensors})
    chosen, notes = _choose(tensors, role)
    found = peel(chosen)
    return Found(found.tensors, notes + found.notes)


def _choose(tensors: Tensors, role: Role) -> Found:
    """Return the network of `role` without its prefix, and what is of neither and not known."""
    for teacher, student in NETWORKS:
        held = [each for each in (teacher, student) if _some_begin_with(tensors, each)]
        # `backbone.` alone does not tell of two networks: one beside its head begins so, too
        if not held or held == ["backbone."]:
            continue
        prefix = teacher if role == "teacher" else student
        if prefix not in held:
            raise ValueError(f"holds no {role}, but {held[0].rstrip('.')}")
        of_neither = [key for key in tensors if not key.startswith((teacher, student))]
        heads = [key for key in of_neither if key.startswith(("head.", "projection_head."))]
        unknown = [key for key in of_neither if key not in heads]
        names = {key: key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
        names |= {key: key for key in unknown}
        notes = [f"{role}: its {prefix.rstrip('.')}"]
        if heads:
            notes.append(f"left out: {counted(heads)}")
        return Found(_renamed({key: tensors[key] for key in names}, names), notes)
    return Found(tensors, [])


def peel(tensors: Tensors) -> Found:
    """Return a network without what is known to be no backbone and without common prefixes."""
    left_out: list[str] = []
    for _ in range(4):
        left_out += [key for key in tensors if _is_no_backbone(key)]
        tensors = {key: tensor for key, tensor in tensors.items() if not _is_no_backbone(key)}
        prefix = _common_prefix(tensors)
        if prefix is None:
            break
        tensors = _renamed(tensors, {key: key.removeprefix(prefix) for key in tensors})
    notes = [f"left out: {counted(left_out)}"] if left_out else []
    return Found(_by_usual_names(tensors), notes)


def _is_no_backbone(key: str) -> bool:
    if key.split(".")[0] in NO_BACKBONE:
        return True
    return any(pattern.match(key) is not None for pattern in (MLP_HEADS, LOSSES))


def _some_begin_with(tensors: Tensors, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in tensors)


def _common_prefix(tensors: Tensors) -> str | None:
    """Return what is before most keys, so that what is not known beside them is named later.

    `backbone.` only where it is before all: else a head is beside it.
    """
    for prefix in PREFIXES:
        num = sum(key.startswith(prefix) for key in tensors)
        is_of_all = num > 0 and num == len(tensors)
        is_of_most = num > len(tensors) / 2
        if is_of_all or (prefix != "backbone." and is_of_most):
            return prefix
    return None


def counted(keys: Iterable[str]) -> str:
    """Return the first parts of keys, each once, with how many keys begin with it."""
    counts: dict[str, int] = {}
    for key in keys:
        name = key.split(".")[0]
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({num})" if num > 1 else name for name, num in counts.items())


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Return tensors by other names. ValueError where two would have the same."""
    renamed = {names[key]: tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError("has two tensors of one name below its wrappers")
    return renamed


def _by_usual_names(tensors: Tensors) -> Tensors:
    """Return tensors by torchvision's and timm's names where these are known to be others."""
    names = {key: key for key in tensors}
    numbers = {key.split(".")[0] for key in tensors}
    if numbers == {"0", "1", "2", "3", "4", "5"}:
        text = "is lightly's own ResNet in a Sequential, which has no ReLU after its first layer"
        raise ValueError(f"{text}: no backbone here computes its features")
    if numbers == RESNET_CHILDREN.keys():
        for key in tensors:
            number, _, rest = key.partition(".")
            names[key] = f"{RESNET_CHILDREN[number]}.{rest}"
    # DINOv2 trains with blocks in chunks: blocks.1.6 is block 6, in chunk 1. The second number goes
    # on from chunk to chunk; in networks with stages of blocks it begins anew.
    chunked = re.compile(r"(?:backbone\.)?blocks\.(\d+)\.(\d+)\.")
    blocks = {match.groups() for match in map(chunked.match, tensors) if match}
    are_chunks = len({number for _, number in blocks}) == len(blocks)
    for key, name in names.items():
        if are_chunks:
            name = re.sub(r"^((?:backbone\.)?blocks)\.\d+\.(?=\d+\.)", r"\1.", name)
        # lightly's ResNets
        names[key] = re.sub(r"(?<=layer)(\d\.\d+)\.shortcut\.", r"\1.downsample.", name)
    return _renamed(tensors, names)


def by_timms_names(tensors: Tensors, net: nn.Module) -> Tensors:
    """Return a backbone's tensors by the names of `net`, as timm itself converts them for it.

    timm's file of each architecture has such a function, for the weights that its authors
    published. Raises ValueError where that cannot make sense of these tensors.
    """
    own = net.state_dict()
    if own.keys() <= tensors.keys():
        return tensors
    timms = next((x for x in type(net).__mro__ if x.__module__.startswith("timm.models.")), None)
    convert = getattr(inspect.getmodule(timms), "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    given = dict(tensors)  # some of the functions change it
    options: dict[str, bool] = {}
    if isinstance(net, VisionTransformer):
        options["adapt_layer_scale"] = True
        if "register_tokens" in tensors or any(".mlp.w12." in key for key in tensors):
            given["mask_token"] = torch.zeros(1)  # by which timm knows DINOv2; it was left out
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # one of them prints what it misses
            converted = convert(given, net, **options)
    except Exception as error:  # whatever their code meets in tensors of another kind
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"timm cannot convert it: {reason}") from error
    _require_no_lost_bias(tensors, converted)
    return converted


def _require_no_lost_bias(tensors: Tensors, converted: Tensors) -> None:
    """Raise ValueError where DINOv3's biases were dropped, for an architecture that has none."""
    keys = [key for key in tensors if key.endswith("attn.qkv.bias") and key not in converted]
    lost = [key for key in keys if key.replace("qkv.bias", "q_bias") not in converted]
    if any(tensors[key].any() for key in lost):
        raise ValueError(f"it has biases that this architecture lacks: {', '.join(lost[:3])}")
