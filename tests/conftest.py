import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

torch.set_num_threads(2)


def make_tiny_vit(num_classes: int = 5, **kwargs) -> VisionTransformer:
    """A ViT of 3 blocks, width 24, for 8 x 8 images, with random weights."""
    torch.manual_seed(0)
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **settings | kwargs)


@pytest.fixture
def tiny_vit() -> VisionTransformer:
    return make_tiny_vit()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line's `main` in this process: (exit code, standard output, standard error)."""

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
