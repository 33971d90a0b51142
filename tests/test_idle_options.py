"""What is asked for in vain is told in a line, and what recipes and defaults bring along is not."""

import pytest

from mosa_fast.idle_options import idle_options
from mosa_fast.recipes import packaged
from mosa_fast.run_folder import RunFolder
from mosa_fast.run_options import parse
from mosa_fast.sweeps.arguments import FOLDERS_OF_PARTS
from mosa_fast.train import main

RECIPES = sorted(str(p) for p in packaged().rglob("*.yaml") if p.parent.name not in FOLDERS_OF_PARTS)


def told(*words):
    return idle_options(parse(list(words))[0], words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--method adapter --adapter.experts 2", "adapter.experts has no effect: method adapter has experts 1"),
        ("--method=adapter --adapter.experts=4", "adapter.experts has no effect: method adapter has experts 1"),
        ("--method linear --loss.views 2", "loss.views has no effect: method linear has one view of a batch"),
        (
            "--method full --adapter.rank 2 --loss.add_weight 1",
            "adapter.rank and loss.add_weight have no effect: method full has no adapters",
        ),
        ("--config vtab/dtd --patience 3", "patience has no effect: with data.mode final nothing is validated"),
        ("--adapter.rank 4", "adapter.rank has no effect: only low-rank pairs have it, with method lora or"),
        ("--method lora --adapter.bottleneck 4", "adapter.bottleneck has no effect: low-rank pairs have no such thing"),
        ("--adapter.experts 1 --adapter.share up", "adapter.share has no effect: there is one expert"),
        ("--loss.views 1 --loss.deep_reg true", "loss.deep_reg has no effect: there is one view of a batch"),
        ("--loss.reg_weight 0 --loss.deep_reg true", "loss.deep_reg has no effect: loss.reg_weight is 0"),
        ("--partial_blocks 2", "partial_blocks has no effect: it is for method partial"),
        ("--model.checkpoint_md5 ab", "model.checkpoint_md5 has no effect: there is no model.checkpoint"),
        ("--method scratch --model.checkpoint a", "model.checkpoint has no effect: the backbone begins with random"),
    ],
)
def test_what_is_asked_for_in_vain_is_told_with_the_reason(words, line):
    (found,) = told(*words.split())
    assert found.startswith(line)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--method adapter --loss.views 2 --loss.deep_reg true",
        "--method adapter --adapter.experts 1 --adapter.bottleneck 8",
        "--method linear --loss.views 1 --loss.reg_weight 0 --adapter.seed 1",
        "--config fgvc/cars --method linear",  # two experts and the deep term are the recipe's
        "--config vtab/dtd --data.mode tune --patience 3",
        "--method partial --partial_blocks 2",
        "--adapter.method lora --adapter.rank 4 --adapter.experts 2 --adapter.share up",
    ],
)
def test_what_has_an_effect_is_not_told_nor_what_others_bring_along(words):
    assert told(*words.split()) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_asks_for_anything_in_vain(recipe):
    assert told("--config", recipe) == []


def test_a_recipe_of_the_users_asks_for_what_it_says_itself(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("base: base.yaml\nmethod: adapter\nadapter: {experts: 2}\n")
    (tmp_path / "base.yaml").write_text("partial_blocks: 3\n")
    assert told(f"--config={recipe}") == ["adapter.experts has no effect: method adapter has experts 1"]
    assert told("--config", str(recipe), "--method=mosa") == []


def test_a_run_says_it_on_standard_error_and_goes_on(tmp_path, capsys):
    tiny = ["--model.name=test_vit", "--model.pretrained=false", "--data.image_size=32", "--tensorboard=false"]
    fast = ["--optim.epochs=1", "--data.shots=1", "--optim.batch_size=10", f"--out={tmp_path}"]
    main([*tiny, *fast, "--method=linear", "--loss.views=2"])
    assert "note: loss.views has no effect: method linear has one view of a batch\n" in capsys.readouterr().err
    assert RunFolder(tmp_path).is_finished
