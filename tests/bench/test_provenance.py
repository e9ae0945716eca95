"""What a record says of the files that ran."""

import os
import subprocess

from fdpp_jax.bench import provenance


def test_a_tree_has_git_s_own_id(tmp_path):
    def git(*arguments):
        settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        done = subprocess.run(
            ["git", *arguments], cwd=tmp_path, env=os.environ | settings, capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    folder = tmp_path / "package"
    for name, text in {"a.py": "1\n", "a/b.py": "2\n", "a/z/c.json": "{}", "a.x": "", "__pycache__/a.pyc": "x"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "empty" / "__pycache__").mkdir(parents=True)
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    git("init", "-q")
    git("add", ".")
    assert provenance.git_tree(folder).hex() == git("rev-parse", f"{git('write-tree')}:package")


def test_another_file_is_another_tree(tmp_path):
    (tmp_path / "a.py").write_text("1\n")
    before = provenance.git_tree(tmp_path)
    (tmp_path / "a.py").write_text("2\n")
    assert provenance.git_tree(tmp_path) != before
