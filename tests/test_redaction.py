"""Secrets stay out of whatever a run writes or says: URLs with passwords and signatures, tokens, and secret environment variables."""

import subprocess
import sys

import pytest

from protoclip_scale.engine.prefetch import _without_a_hub
from protoclip_scale.recipe import diff, dump, load_recipe
from protoclip_scale.redact import redact_text, redacted, stars_in
from tests.servers import Server
from tests.support import CORPUS, RECIPES, ROOT, TINY, output, pretrain

VARIABLES = {
    "HF_TOKEN": "environment-hub-token-1",
    "AWS_SECRET_ACCESS_KEY": "environment/aws+secret-2",
    "AWS_SESSION_TOKEN": "environment-session-token-3",
    "WANDB_API_KEY": "environment-wandb-key-4",
}
SECRETS = ("passw0rd-of-url", "s1gnature-of-url", "an0ther-signature", *VARIABLES.values())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@host/a.parquet", "https://***@host/a.parquet"),
        ("s3://key:sec@ret@bucket/a", "s3://***@bucket/a"),
        ("https://host/a?X-Amz-Date=1&X-Amz-Expires=60&X-Amz-Signature=ab%2Fc", "https://host/a?X-Amz-Date=***&X-Amz-Expires=***&X-Amz-Signature=***"),
        ("https://host/a?Expires=1&Signature=b&Key-Pair-Id=c", "https://host/a?Expires=***&Signature=***&Key-Pair-Id=***"),
        ("https://account.host/c/s-{0..9}.tar?sv=1&se=2&sp=r&sig=a%3D", "https://account.host/c/s-{0..9}.tar?sv=***&se=***&sp=***&sig=***"),
        ("https://host/a?file=b&token=x&n=2", "https://host/a?file=b&token=***&n=2"),
        ("train-*.parquet?token=s3cret", "train-*.parquet?token=***"),
        ("status 403 (https://host/a?sig=secret).", "status 403 (https://host/a?sig=***)."),
        ("DefaultEndpointsProtocol=https;AccountKey=abc==;EndpointSuffix=x", "DefaultEndpointsProtocol=https;AccountKey=***;EndpointSuffix=x"),
        ("Authorization: Bearer abcdefghijklmnopqrst", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnop1234 and AKIAABCDEFGHIJKLMNOP", "*** and ***"),
        # what is no secret
        ("https://host/a?page=2&se=5", "https://host/a?page=2&se=5"),
        ("hf://datasets/org/name@main/a.parquet", "hf://datasets/org/name@main/a.parquet"),
        ("s3://bucket/mail@host/a", "s3://bucket/mail@host/a"),
        ("is it there? a=b", "is it there? a=b"),
    ],
)
def test_text(text, shown):
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


def test_values_of_secret_variables(monkeypatch, tmp_path):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "not-secret-at-all")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))  # a path to secrets
    monkeypatch.setenv("SHORT_TOKEN", "the")
    text = " ".join([*VARIABLES.values(), "not-secret-at-all", str(tmp_path), "the"])
    assert redact_text(text) == f"*** *** *** *** not-secret-at-all {tmp_path} the"


@pytest.mark.parametrize(
    "name",
    ["SLURM_JWT", "PGPASSWORD", "MYSQL_PWD", "GITHUB_PAT", "B2_APPLICATION_KEY", "FSSPEC_S3_KEY", "RCLONE_CONFIG_PASS", "DOCKER_AUTH_CONFIG", "SSHPASS", "AZURE_STORAGE_KEY"],
)
def test_names_of_secret_variables(monkeypatch, name):
    monkeypatch.setenv(name, "value-of-a-variable")
    assert redact_text("value-of-a-variable") == "***"


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "PATH", "XAUTHORITY", "SSH_AUTH_SOCK", "KEYBOARD", "BYPASS", "TOKENIZERS_PARALLELISM", "SLURM_JOB_PARTITION"])
def test_names_of_other_variables(monkeypatch, name):
    monkeypatch.setenv(name, "value-of-a-variable")
    assert redact_text("value-of-a-variable") == "value-of-a-variable"


def test_a_fetch_shows_no_signature():
    """``--check --fetch`` names what it cannot fetch: rows that are read over the network."""
    source = "{files: 'https://me:passw0rd-of-url@host/a.parquet?X-Amz-Signature=s1gnature-of-url'}"
    [line] = [line for line in _without_a_hub(load_recipe(RECIPES / "demo_clip.yaml", (*TINY, f"data.sources=[{source}]"))) if "network" in line]
    assert "https://***@host/a.parquet?X-Amz-Signature=***" in line and not any(secret in line for secret in SECRETS)


def test_keys_that_name_a_secret():
    value = {"hub_token": "abc", "tokens": 3, "nested": [{"password": "x"}, {"api_key": None}], "empty_caption": "drop"}
    assert redacted(value) == {"hub_token": "***", "tokens": 3, "nested": [{"password": "***"}, {"api_key": None}], "empty_caption": "drop"}


def url(path: str, date: int, signature: str) -> str:
    return f"https://me:pw@host/{path}?X-Amz-Date={date}&X-Amz-Expires=60&X-Amz-Signature={signature}"


def test_another_signature_is_the_same_recipe_and_another_path_is_not(tmp_path):
    def of(source: str):
        return load_recipe(RECIPES / "demo_clip.yaml", (*TINY, f"data.sources=[{{files: '{source}'}}]"))

    written = tmp_path / "recipe.yaml"
    written.write_text(dump(of(url("a.parquet", 1, "abc"))))
    before = load_recipe(written)
    assert diff(before, of(url("a.parquet", 2, "other"))) == []
    [changed] = diff(before, of(url("b.parquet", 2, "other")))
    assert changed.startswith("data.sources: ") and "a.parquet" in changed and "b.parquet" in changed and "other" not in changed and "abc" not in changed
    assert stars_in(before) == "data.sources.0.files" and stars_in(of("a.parquet")) is None


def test_the_error_stream_of_a_process(tmp_path):
    """Tracebacks, warnings and log lines of libraries, of threads too."""
    program = """
import logging, threading, warnings
from protoclip_scale.redact import redact_errors
redact_errors(); redact_errors()
url = "https://me:passw0rd-of-url@host/a?X-Amz-Signature=s1gnature-of-url"
logging.getLogger("x").warning("slow: %s", url)
warnings.warn(url)
def fail(): raise OSError(f"403 for {url}")
thread = threading.Thread(target=fail); thread.start(); thread.join()
fail()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("https://***@host/a?X-Amz-Signature=***") == 4, done.stderr
    assert not any(secret in done.stderr for secret in SECRETS)


@pytest.fixture(scope="module")
def server():
    with Server("http_server", "--root", CORPUS) as server:
        yield server


def test_a_run_writes_no_secret_and_goes_on_with_a_new_signature(server, tmp_path):
    """A signed URL of one shard, with a password; stopped, then resumed with another signature and then with another path."""
    place = server.url.removeprefix("http://")

    def values(signature: str, shard: str = "train-00000-of-00010.parquet") -> tuple[str, ...]:
        signed = f"http://me:passw0rd-of-url@{place}/{shard}?X-Amz-Date={len(signature)}&X-Amz-Signature={signature}"
        return (*TINY, "data.sources=[{name: demo, files: '" + signed + "'}]", "data.retry_seconds=0.1", f"run.copy_to={tmp_path}/copy", "schedule.total=4 steps")

    run = tmp_path / "run"
    codes = [
        pretrain(run, "demo_clip.yaml", values("s1gnature-of-url"), "--check", env=VARIABLES),
        pretrain(run, "demo_clip.yaml", values("s1gnature-of-url"), env=VARIABLES | {"PROTOCLIP_STOP_AT": "train.step:2"}),
        pretrain(run, "demo_clip.yaml", values("an0ther-signature"), env=VARIABLES),
        pretrain(run, "demo_clip.yaml", values("an0ther-signature", "train-00001-of-00010.parquet"), env=VARIABLES),
        pretrain(tmp_path / "missing", "demo_clip.yaml", values("an0ther-signature", "nothing-here.parquet"), env=VARIABLES),
    ]
    assert codes == [[0], [75], [0], [1], [1]], output(run)
    errors = [line for line in (output(run) + output(tmp_path / "missing")).splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "data.sources" in errors[0] and "train-00001" in errors[0] and "nothing-here.parquet" in errors[1]
    looked_at = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "environment.json", "status.json", "log.txt", "manifest.json", "sources.json", "run-rank0.log"} <= {path.name for path in looked_at}
    for path in looked_at:
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path
    assert "***@" in (run / "recipe.yaml").read_text()


def test_a_recipe_with_stars_does_not_train(tmp_path, capsys):
    from protoclip_scale.engine import command

    path = tmp_path / "run.yaml"
    path.write_text(dump(load_recipe(RECIPES / "demo_clip.yaml", (*TINY, "data.root=https://me:passw0rd-of-url@host/data"))))
    assert command.main(["--recipe", str(path), "--run-dir", str(tmp_path / "run")]) == 1
    assert "data.root holds ***, which stands for a secret that was not written down; give the value again" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
