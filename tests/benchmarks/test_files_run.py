"""The tool that counts files: on a package made up for it."""

from pathlib import Path

from tools.files_run import files_of

FILES = {
    "orchestrator/__init__.py": "VALUE = 1\n",
    "orchestrator/cli.py": "import threading\nfrom parts import called, idle, in_thread, listed\n"
    "def main():\n    called.run()\n    thread = threading.Thread(target=in_thread.run)\n"
    "    thread.start()\n    thread.join()\n    raise SystemExit(0)\n",
    "parts/__init__.py": "",
    "parts/called.py": "def run():\n    pass\n",
    "parts/in_thread.py": "def run():\n    pass\n",
    "parts/listed.py": "SQUARES = [n * n for n in range(3)]\n",
    "parts/idle.py": "class Idle:\n    size = 1\n\n    def run(self):\n        pass\n",
}


def test_a_file_counts_if_a_function_of_it_ran_in_any_thread_or_at_import(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = files_of(["simulate"], tmp_path, ("orchestrator", "parts"))
    assert found == ["orchestrator/cli.py", "parts/called.py", "parts/in_thread.py", "parts/listed.py"]
