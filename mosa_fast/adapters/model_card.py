"""The page that shared adapters are shown with on the Hugging Face Hub (docs/sharing.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import timm

from mosa_fast.adapters.metadata import Metadata
from mosa_fast.options import counted

CLASSES_SHOWN = 20
USE = """\
## Use

```python
import mosa_fast
from mosa_fast.data.image_file import read_image
from mosa_fast.data.transforms import evaluation_transform

{backbone}model = mosa_fast.AdaptedModel.from_pretrained({name}{argument}).eval()
image = evaluation_transform(model.preprocessing)(read_image("image.jpg"))
print(model.classes[model(image[None]).argmax()])
```
"""
MAKE_BACKBONE = "backbone = ...  # the timm model {name} with the weights named above\n"


def model_card(metadata: Metadata, name: str, summary: Mapping[str, Any] | None = None) -> str:
    """Markdown with the header that the Hub reads.

    Args:
        metadata: of the adapter file.
        name: what `from_pretrained` is to be given.
        summary: of the run that trained the adapters (summary.json), for data, accuracy and numbers of weights.
    """
    config: Mapping[str, Any] = (summary or {}).get("config", {})
    from_timm = metadata.backbone is not None and timm.is_model_pretrained(metadata.backbone)
    model_section = config.get("model", {})
    own_weights = None
    if model_section.get("checkpoint"):
        own_weights = f"weights of the file `{model_section['checkpoint'].rpartition('/')[2]}`"
    elif not model_section.get("pretrained", True):
        own_weights = f"random weights (seed {config.get('seed')})"
    rows = [("backbone", f"`{metadata.backbone}`, frozen, not in this repository" if metadata.backbone else "unknown")]
    if own_weights:
        rows.append(("backbone's weights", own_weights))
    rows.append(("adapters", _adapters(metadata)))
    if metadata.classes:
        more = len(metadata.classes) - CLASSES_SHOWN
        shown = ", ".join(metadata.classes[:CLASSES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        rows.append((f"{len(metadata.classes)} classes", shown))
    if metadata.preprocessing:
        rows.append(("images", _images(metadata)))
    rows += _of_run(summary) if summary else []
    rows.append(("versions", ", ".join(f"{library} {version}" for library, version in metadata.versions.items())))
    header = ["library_name: mosa_fast", "pipeline_tag: image-classification", "tags: [mosa, adapter, timm]"]
    if from_timm and not own_weights:
        header.append(f"base_model: timm/{metadata.backbone}")
        header.append("base_model_relation: adapter")
    makes_backbone = metadata.can_make_backbone and not own_weights
    use = USE.format(
        name=json.dumps(name),
        backbone="" if makes_backbone else MAKE_BACKBONE.format(name=metadata.backbone),
        argument="" if makes_backbone else ", backbone=backbone",
    )
    table = "\n".join(f"| {label} | {_cell(text)} |" for label, text in rows)
    title = f"Adapters for {metadata.backbone or 'a vision transformer'}"
    about = (
        "Trained with mosa_fast: Mixture of Sparse Adapters "
        "([MoSA, arXiv 2312.02923](https://arxiv.org/abs/2312.02923)) in a frozen timm model."
    )
    start = "\n".join(["---", *header, "---", "", f"# {title}", "", about])
    return f"{start}\n\n| | |\n| --- | --- |\n{table}\n\n{use}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _adapters(metadata: Metadata) -> str:
    config = metadata.config
    if config.method == "lora":
        kind = f"low-rank pairs of rank {config.rank} on {', '.join(config.targets)}"
    else:
        kind = f"placement {config.placement}, bottleneck {config.bottleneck}"
    return kind + (f", {config.experts} experts, share {config.share}" if config.experts > 1 else ", dense")


def _images(metadata: Metadata) -> str:
    made = metadata.preprocessing
    assert made is not None
    size = f"{made.image_size} x {made.image_size}"
    cut = "both sides resized" if made.resize is None else f"shorter side resized to {made.resize}, centre cut out"
    return f"{size} ({cut}, {made.interpolation}), mean {list(made.mean)}, std {list(made.std)}"


def _of_run(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    config, rows = summary["config"], []
    data, optim = config["data"], config["optim"]
    words = [data["name"], *([data["task"]] if data.get("task") else [])]
    if data["name"] == "digits":
        words.append("(all images)" if data["shots"] is None else f"({data['shots']} images per class)")
    rows.append(("data", " ".join(words)))
    if summary.get("test_accuracy") is not None:
        rows.append(("test accuracy", f"{summary['test_accuracy']:.2f} %"))
    if summary.get("val_accuracy") is not None:
        rows.append(("validation accuracy", f"{summary['val_accuracy']:.2f} % (it selected the epoch)"))
    rows.append(("trained weights", f"{summary['trained_weights']:,} + head {summary['head_weights']:,}"))
    training = f"{counted(summary['epochs'], 'epoch')} of {optim['optimizer']}, learning rate {optim['lr']:g}"
    batch = optim["batch_size"] * summary["processes"]
    rows.append(("training", f"{training}, batch size {batch}, {config['precision']}"))
    return rows
