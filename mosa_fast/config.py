"""What is put into a model (`MoSAConfig`) and what a run does (`TrainConfig`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from mosa_fast.methods import MEANINGS, METHODS, MethodName
from mosa_fast.options import check_fields, check_value, facts_of, option

MAX_EXPERTS = 255  # ids are uint8
MAX_SEED = 2**63 - 1  # seeds are int64
MAX_EPOCHS = 1_000_000
MAX_IMAGE_SIZE = 16384
MAX_BOTTLENECK = 65_536  # many times the width of any model

Share = Literal["down", "up", "none"]
BiasMode = Literal["per_expert", "split"]
MergeRule = Literal["mean", "joint"]
Placement = Literal["adaptformer", "pfeiffer", "houlsby"]
if TYPE_CHECKING:
    Targets = str
else:
    Targets = Literal[tuple("".join(letters) for n in range(1, 5) for letters in combinations("qkvo", n))]
Routing = Literal["random", "fixed"]
Activation = Literal["auto", "gelu", "relu", "silu"]
Family = Literal["digits", "fashion_mnist", "folder", "fgvc", "vtab", "gicd", "timm"]
AUGMENTED = ("folder", "fgvc", "gicd", "timm")  # vtab trains on unchanged images, by its definition
Precision = Literal["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"]


@dataclass(frozen=True)
class MoSAConfig:
    """The adapters of a model (docs/method.md, Placements, Weights and gradients, Merge).

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    method: Literal["adapter", "lora"] = "adapter"
    """adapter: bottleneck adapters beside the branches of a block; lora: low-rank pairs on its attention's linears
    (MoSL), for which bottleneck, placement, activation, dropout and bias mean nothing."""
    rank: int = option(16, low=1, cap=MAX_BOTTLENECK)
    """lora only: rank of the pairs."""
    targets: Targets = "qv"
    """lora only: the projections that get a pair each, of q, k, v and o."""
    bottleneck: int = option(64, low=1, cap=MAX_BOTTLENECK)
    """Width r of the adapters."""
    experts: int = option(4, low=1, high=MAX_EXPERTS)
    """Number of experts E that a split projection is divided among. 1: a dense adapter."""
    share: Share = "down"
    """The projection that is NOT split: down (dense down, split up), up, or none (both split)."""
    placement: Placement = "adaptformer"
    """Where adapters sit. adaptformer: parallel to the MLP; pfeiffer: on the MLP's output; houlsby: on the residual
    stream, after the attention and after the MLP."""
    activation: Activation = "auto"
    """Of the bottleneck; auto: the placement's (adaptformer gelu, pfeiffer relu, houlsby silu). gelu is exact."""
    form: Literal["auto", "branch", "mlp"] = option("auto", free=True)
    """How an adaptformer adapter is computed, the same function either way. branch: beside the MLP; mlp: inside the
    frozen MLP's products, refused where that is not exact; auto: mlp where it is exact and known to be faster, on a CPU
    in float32 without torch.compile and not for the smallest inputs, else branch."""
    scale: float | Literal["auto", "trainable"] = "auto"
    """Factor on an adapter's output; auto: the placement's (adaptformer 0.1, others 1); trainable: learned from 1.0."""
    dropout: float | Literal["auto"] = option("auto", low=0.0, below=1.0)
    """Probability of dropping a hidden activation; auto: the placement's (adaptformer 0.1, others 0)."""
    bias: BiasMode = "per_expert"
    """per_expert: every expert has its own bias vector; split: the elements of one vector have owners."""
    merge: MergeRule = "mean"
    """How experts merge. mean: W0 + (W - W0) / E. joint: W / E (the same where W0 is zero)."""
    routing: Routing = "random"
    """random: every pass draws its experts, evaluation merges them; fixed: expert 0, always, merged or not."""
    seed: int = option(3407, low=0, cap=MAX_SEED)
    """Seed of the owner maps and the initial weights."""

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields that say what is computed, as JSON can hold them: all but those that change no result."""
        return {name: value for name, value in asdict(self).items() if not facts_of(type(self))[name].free}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoSAConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is unknown, as in a file of a newer version.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"MoSAConfig has no field {', '.join(sorted(unknown))}")
        return cls(**values)


@dataclass
class DataConfig:
    """The images."""

    name: Family = "digits"
    """digits: the embedded 8x8 handwritten digits; fashion_mnist: Fashion-MNIST, a few images a class; folder:
    ROOT/{train,val,test}/<class>/*.jpg; fgvc: one of the five fine-grained sets, or all; vtab: a task of VTAB-1k; gicd:
    CIFAR-100, Aircraft or Food-101 through torchvision; timm: any set of torchvision, of the Hugging Face Hub, or in
    webdataset's shards."""
    task: str | None = option(None, families=("fgvc", "vtab", "gicd", "timm"))
    """Data set of the family. fgvc: cub, nabirds, flowers, dogs, cars, multitask; vtab: its 19 tasks; gicd: cifar100,
    aircraft, food101; timm: torch/NAME, hfds/NAME or wds/."""
    root: str | None = option(None, free=True)
    """Folder of the data set (vtab: of all tasks; hfds: the cache, by default the usual one); digits needs none."""
    download: bool = option(False, families=("fashion_mnist", "gicd", "timm"), free=True)
    """Fetch what is missing."""
    mode: Literal["tune", "final"] = option("tune", families=("vtab", "gicd"))
    """tune: validation images choose the epoch; final: they are trained on too, so that there is nothing to choose with
    and the last epoch is reported."""
    fraction: float | None = option(None, above=0.0, high=1.0, families=("fgvc",))
    """Train on train_<fraction>.json, as in train_0.1.json. None: on train.json."""
    normalisation: Literal["imagenet", "backbone"] = option(
        "imagenet", families=("folder", "fgvc", "vtab", "gicd", "timm")
    )
    """Mean and standard deviation of images from files: ImageNet's, as in the paper, or the backbone's own."""
    shots: int | None = option(50, low=1, families=("digits", "fashion_mnist"))
    """Training images per class (of digits at most 74). None: all of them."""
    image_size: int | None = option(None, low=1, cap=MAX_IMAGE_SIZE)
    """Side of the square images in pixels. None: what the backbone expects."""
    workers: int = option(2, low=0, free=True)
    """Processes that load images (none for digits and fashion_mnist)."""
    val_fraction: float = option(0.1, above=0.0, below=1.0, families=("folder", "gicd", "timm"))
    """Part of the training images, cut class by class with the run's seed, where no validation images are given."""
    train_split: str | None = option(None, families=("timm",))
    """Name of the part to train on. None: train, or what is usual in its place."""
    val_split: str | None = option(None, families=("timm",))
    """Name of the part to select with. None: val or the like; without one, and without a test part, cut from train."""
    test_split: str | None = option(None, families=("timm",))
    """Name of the part to test on. None: test; without one val, and without that, a fifth of the images."""
    image_key: str | None = option(None, families=("timm",))
    """Column of the images (hfds), or what their files end in (wds). None: image; jpg, png or webp."""
    label_key: str | None = option(None, families=("timm",))
    """Column of the labels (hfds), or their field in the json files (wds). None: label; the cls files."""
    crop_scale: float | None = option(None, above=0.0, high=1.0, families=AUGMENTED)
    """Train on random parts of an image of at least this part of its area, resized. None: a random crop after resizing
    the shorter side to 8/7, as in the paper."""
    augment: Literal["none", "randaugment", "autoaugment", "trivial", "augmix"] = option("none", families=AUGMENTED)
    """Random changes of the training images' colours and geometry, as torchvision's classes of these names make them.
    """
    random_erasing: float = option(0.0, low=0.0, high=1.0, families=AUGMENTED)
    """Probability of erasing a random rectangle of a training image."""
    mixup: float = option(0.0, low=0.0, families=AUGMENTED)
    """Mix training images with others, their parts drawn from Beta(mixup, mixup). 0: do not. The loss and the training
    accuracy are then those of the mixtures."""
    cutmix: float = option(0.0, low=0.0, families=AUGMENTED)
    """Put boxes of others into training images, their areas drawn from Beta(cutmix, cutmix). 0: do not; with mixup too,
    half of the images get the one and half the other."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")


@dataclass
class ModelConfig:
    """The frozen backbone and its head."""

    name: str = "embedded"
    """A timm model, or embedded: the small ViT that travels in the package. Adapters need one of timm's vision
    transformers."""
    pretrained: bool = True
    """Load pretrained weights: those of `checkpoint`; without one, timm downloads its own, the embedded are shipped."""
    checkpoint: str | None = None
    """File with the backbone's weights (npz of the original ViT, pth, pth.tar, safetensors); its head is dropped."""
    checkpoint_md5: str | None = None
    """What the MD5 digest of the checkpoint begins with; another file is refused. None: any file."""
    head_init: Literal["timm", "published"] = "timm"
    """Initial head. published: Kaiming-normal fan-out weights, bias -ln 99; timm: as timm makes it."""
    backbone_dropout: float = option(0.0, low=0.0, below=1.0)
    """Dropout on the embeddings and twice in each MLP of the frozen backbone (the paper's ViT recipes: 0.1)."""
    drop_path: float = option(0.0, low=0.0, below=1.0)
    """Rate of stochastic depth in the frozen backbone."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")


@dataclass
class OptimConfig:
    """AdamW or SGD, linear warm-up per step, cosine to zero."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: betas 0.9 and 0.999, eps 1e-6; sgd: momentum 0.9 (the paper's linear probes)."""
    lr: float = option(1e-3, low=0.0)
    """Peak learning rate."""
    weight_decay: float = option(0.01, low=0.0)
    """Weight decay, on everything but biases."""
    epochs: int = option(100, low=1, cap=MAX_EPOCHS)
    """Passes over the training images."""
    warmup_epochs: float | Literal["auto"] = option("auto", low=0.0)
    """Epochs of linear warm-up, no more than the run has; auto: a tenth of them."""
    batch_size: int = option(128, low=1)
    """Images per step and process (every view of an image counts as the same image)."""
    accumulate: int = option(1, low=1)
    """Work through each step's batch in so many parts: the same result with less memory."""

    def __post_init__(self) -> None:
        check_fields(self, "optim.")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 10 if self.warmup_epochs == "auto" else self.warmup_epochs


@dataclass
class LossConfig:
    """The two-view loss (docs/method.md, Loss)."""

    views: Literal[1, 2] | None = None
    """Stochastic passes of each batch: 2, or 1, which has no consistency terms. None: 2 for mixtures of adapters, 1 for
    dense ones. Methods without adapters have 1."""
    add_weight: float = option(0.0, low=0.0)
    """Weight of the second view's cross-entropy."""
    reg_weight: float = option(1.0, low=0.0)
    """Weight of the symmetric KL divergence between the views."""
    deep_reg: bool = False
    """Also pull the two views' outputs of the first six blocks together."""
    class_weights: Literal["none", "inverse", "inverse_sqrt"] = "none"
    """Weights of the classes in the cross-entropy, from the training counts, scaled to sum to their number."""

    def __post_init__(self) -> None:
        check_fields(self, "loss.")


@dataclass
class LoaderConfig:
    """Reading the images."""

    cache: bool = option(False, free=True)
    """Decode the training and validation images once and keep them in memory, shared by all workers (height x width
    x 3 bytes an image): for small data sets whose decoding is slower than the steps."""
    corrupt: Literal["fatal", "skip"] = "fatal"
    """An image that cannot be read. fatal: stop and name it. skip: open every image before training, name those that
    cannot be read and leave them out."""

    def __post_init__(self) -> None:
        check_fields(self, "loader.")


@dataclass
class TrainConfig:
    """One run of `python -m mosa_fast.train`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodName = option("mosa", note=MEANINGS)  # noqa: RUF009  # a field, whatever its type is called
    """What is trained."""
    partial_blocks: int = option(1, low=1)
    """Blocks that the method partial trains, from the last."""
    adapter: MoSAConfig = field(default_factory=MoSAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    seed: int = option(3407, low=0, cap=MAX_SEED)
    """Seed of everything random but the adapters' owner maps and initial weights (adapter.seed)."""
    out: str = option("runs/default", free=True)
    """Folder that the run writes its files to."""
    device: str = option("auto", free=True)
    """cpu, cuda, cuda:1 and so on; auto: a GPU where there is one."""
    eval_every: int = option(1, low=1)
    """Validate after every so many epochs, and after the last."""
    test: bool = True
    """Evaluate the test images, once, at the end; false leaves them unread, as in a search."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    precision: Precision = "fp32"
    """Arithmetic. Trained weights and AdamW's state are float32 in all of them. bf16-mixed, fp16-mixed: products in
    half precision, the residual stream in float32; bf16-true: the frozen backbone and the stream in bfloat16."""
    compile: bool = option(False, free=True)
    """Compile the forward and backward pass with torch.compile (takes a minute or so at the start)."""
    cuda_graphs: bool = option(False, free=True)
    """Capture the whole step in a CUDA graph: for steps so short that launching their kernels takes longer than the
    kernels. One GPU."""
    grad_checkpointing: bool = False
    """Recompute each block in the backward pass in place of keeping its activations: slower, with much less memory."""
    patience: int | None = option(None, low=1)
    """Stop after so many validations in a row without a better one. None: train all epochs."""
    max_bad_steps: int = option(10, low=1)
    """A step whose gradients are not finite changes nothing; stop after so many of them in a row."""
    checkpoint_every: int = option(1, low=1, free=True)
    """Save a checkpoint to resume from after every so many epochs, and after the last."""
    checkpoint_steps: int | None = option(None, low=1, free=True)
    """Save one after every so many steps too, for long epochs. None: only between epochs."""
    log_every: int = option(20, low=1, free=True)
    """Read losses and accuracies from the device, and show them, every so many steps."""
    tensorboard: bool = option(True, free=True)
    """Write TensorBoard files to OUT/tensorboard, if the package tensorboard is installed."""
    wandb: str | None = option(None, free=True)
    """Project of Weights & Biases to log to; needs the package wandb. None: do not."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optim.warmup > self.optim.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs} is longer than the run of {self.optim.epochs} epochs: "
                "give fewer, or auto for a tenth"
            )
        if self.precision == "bf16-true" and not METHODS[self.method].freezes_backbone:
            raise ValueError(f"precision bf16-true needs a frozen backbone; use bf16-mixed with method {self.method}")
        if self.precision == "fp16-mixed" and self.cuda_graphs:
            raise ValueError("cuda_graphs works with fp32, bf16-mixed and bf16-true, not with fp16-mixed")
        if self.optim.optimizer == "sgd" and self.cuda_graphs:
            raise ValueError("cuda_graphs needs optim.optimizer adamw")


def check_experts(experts: int) -> None:
    """Raise ValueError unless a number of experts is in the range that `MoSAConfig` allows."""
    check_value("experts", experts, int, facts_of(MoSAConfig)["experts"])
