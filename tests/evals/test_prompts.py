"""Class names and templates that a recipe gives: files, ImageNet's, OpenAI's."""

from pathlib import Path

import pytest

from clipcluster.errors import UserError
from clipcluster.evals import prompts


def test_the_lines_of_files_in_any_language(tmp_path: Path) -> None:
    names, lines = tmp_path / "label_cn.txt", tmp_path / "templates.txt"
    names.write_text("猫\n狗\nπουλί\n", encoding="utf-8")
    lines.write_text("一张{c}的照片\n\n{c}\n", encoding="utf-8")
    assert prompts.class_names(str(names)) == ["猫", "狗", "πουλί"]
    assert prompts.templates(str(lines)) == ["一张{c}的照片", "{c}"]
    assert prompts.count_of(str(names)) == 3
    prompts.check_named(str(lines))
    lines.write_text("a photo\n")
    with pytest.raises(UserError, match=r"templates\.txt: a template has no \{c\} for the class name"):
        prompts.check_named(str(lines))
    with pytest.raises(UserError, match="one per line, or openai, imagenet-1k, imagenet-12k, imagenet-22k"):
        prompts.class_names("imagenet")
    with pytest.raises(UserError, match=r"no such file of templates; give a file .* or openai, openai-7"):
        prompts.templates(str(tmp_path / "none"))
    with pytest.raises(UserError, match="the class names cannot be read: File name too long"):
        prompts.class_names("n" * 300)


def test_imagenet_s_classes_are_those_of_timm() -> None:
    for given, count in prompts.IMAGENET.items():
        names = prompts.class_names(given)
        assert len(names) == count == prompts.count_of(given)
        assert all(name and "," not in name for name in names)
    assert prompts.class_names("imagenet-1k")[:2] == ["tench", "goldfish"]


def test_openai_s_classes_and_templates_are_those_of_openclip(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    assert prompts.class_names("openai") == list(open_clip.IMAGENET_CLASSNAMES)
    for given, count, theirs in (
        ("openai", 80, open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("openai-7", 7, open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        found = prompts.templates(given)
        assert len(found) == count
        assert [own.replace("{c}", "tench") for own in found] == [own("tench") for own in theirs]
        prompts.check_named(given)
    assert prompts.count_of("openai") == len(prompts.class_names("openai"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for ask in (prompts.count_of, prompts.class_names, prompts.check_named, prompts.templates):
        with pytest.raises(UserError, match="pip install open_clip_torch, or give a file with one per line"):
            ask("openai")
