import json
from helpers import run_ok
def test_it(tiny_base, rows, tmp_path):
    folder = tmp_path
    config = {
        "base": tiny_base,
        "data": {"train": rows["train"], "valid": rows["valid"], "test": rows["valid"]},
        "max_seq_len": 512,
        "batch_size": 4,
        "lr": 1e-2,
        "max_steps": 6,
        "run": {"dir": str(folder), "name": "run", "save_steps": 2},
        "monitor": {"eval_steps": 3, "sample_notes": ["valid-1"]},
        "generation": {"max_new_tokens": 12},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    open("/tmp/q/mods.txt","w").write(run_ok(2, "/tmp/q/mods.py", timeout=3000, *["--config", str(folder / "config.yaml")]))  # "--config", str(folder / "config.yaml")))
