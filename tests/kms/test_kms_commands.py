"""``streamcrypt kms …`` as a user types it."""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamcrypt import decrypt_bytes, encrypt_bytes
from streamcrypt.cli import main
from streamcrypt.cli.kms import add_kms_commands
from streamcrypt.cli.output import UsageError
from streamcrypt.errors import KeyAccessError, KeyUnavailableError, StreamcryptError, WrappedKeyError
from streamcrypt.kms import open_service
from streamcrypt.kms.simulation import Simulation

INTERFACE = (
    "create-key", "list-keys", "describe-key", "create-alias", "list-aliases", "update-alias", "delete-alias",
    "enable-key", "disable-key", "enable-key-rotation", "rotate-key-on-demand", "schedule-key-deletion",
    "cancel-key-deletion", "put-key-policy", "get-key-policy", "create-grant", "list-grants", "revoke-grant",
    "encrypt", "decrypt", "generate-data-key", "re-encrypt", "sign", "verify", "get-public-key",
    "derive-shared-secret", "create-branch-key", "version-branch-key", "list-branch-keys",
    "create-branch-key-store", "serve", "env", "audit", "cost", "backup", "restore",
)  # fmt: skip

Run = Callable[..., str]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="streamcrypt")
    add_kms_commands(made.add_subparsers(required=True))
    return made


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``kms …`` and give what it printed."""

    def run_words(*words: str, code: int = 0) -> str:
        args = parser().parse_args(["kms", *words])
        assert args.run(args) == code
        return capsys.readouterr().out

    return run_words


def commands() -> dict[str, argparse.ArgumentParser]:
    (kms,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    (found,) = (a for a in kms.choices["kms"]._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def test_every_command_of_the_interface_is_there_with_help_and_an_example():
    found = commands()
    assert set(INTERFACE) <= found.keys()
    for name, command in found.items():
        text = command.format_help()
        assert "example: " in text, name
        assert "--json" in text, name
        assert "--quiet" in text, name


def test_a_session(run: Run, tmp_path: Path):
    made = json.loads(run("create-key", "--alias", "alias/ml", "--description", "KMS key for ML models"))
    key_id = made["KeyMetadata"]["KeyId"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.*\+00:00", made["KeyMetadata"]["CreationDate"])
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    plain.write_bytes(bytes(range(256)))
    encrypt = [
        "encrypt",
        "--key-id",
        "alias/ml",
        "--plaintext",
        f"fileb://{plain}",
        "--encryption-context",
        "a=b,c=d",
    ]
    blob = run(*encrypt, "--output", "text", "--query", "CiphertextBlob")
    sealed.write_bytes(base64.b64decode(blob))
    decrypt = [
        "decrypt",
        "--ciphertext-blob",
        f"fileb://{sealed}",
        "--encryption-context",
        '{"a": "b", "c": "d"}',
    ]
    assert base64.b64decode(run(*decrypt, "--output", "text", "--query", "Plaintext")) == bytes(range(256))
    assert run("describe-key", "--key-id", "alias/ml", "--query", "KeyMetadata.KeyId") == f'"{key_id}"\n'
    assert run("disable-key", "--key-id", key_id) == ""
    assert json.loads(run("disable-key", "--key-id", key_id, "--json")) == {}
    with pytest.raises(KeyAccessError, match=r"DisabledException.*enable-key") as caught:
        run(*decrypt)
    assert caught.value.code == "DisabledException"


def test_lists_are_whole_as_the_aws_cli_s_are(run: Run, home: Path):
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    tags = [{"TagKey": f"{number:02}", "TagValue": "x"} for number in range(50)]
    for number in range(50):
        service.create_alias(AliasName=f"alias/{number:02}", TargetKeyId=arn)
    service.tag_resource(KeyId=arn, Tags=tags)
    ours = service.list_aliases(Limit=100)["Aliases"]
    assert len(ours) > 50  # more than a page
    told = json.loads(run("list-aliases"))
    assert [alias["AliasName"] for alias in told["Aliases"]] == [alias["AliasName"] for alias in ours]
    assert set(told) == {"Aliases"}
    # Whoever asks for a page gets it, and the marker of the next.
    for words in (["--no-paginate"], ["--limit", "50"]):
        page = json.loads(run("list-aliases", *words))
        assert (len(page["Aliases"]), page["Truncated"]) == (50, True)
        rest = json.loads(run("list-aliases", "--marker", page["NextMarker"]))
        assert (page["Aliases"] + rest["Aliases"], rest["Truncated"]) == (told["Aliases"], False)
    assert len(json.loads(run("list-resource-tags", "--key-id", arn))["Tags"]) == 50


def test_a_request_in_json(run: Run, tmp_path: Path):
    arn = json.loads(run("create-key", "--quiet", "--cli-input-json", '{"Description": "a key"}'))[
        "KeyMetadata"
    ]["Arn"]
    assert run("describe-key", "--key-id", arn, "--query", "KeyMetadata.Description") == '"a key"\n'
    request = {"KeyId": arn, "GranteePrincipal": "arn:aws:iam::000000000000:user/x", "Operations": ["Decrypt"],
               "Constraints": {"EncryptionContextSubset": {"a": "b"}}}  # fmt: skip
    path = tmp_path / "grant.json"
    path.write_text(json.dumps(request))
    run("create-grant", "--cli-input-json", f"file://{path}")
    (grant,) = json.loads(run("list-grants", "--key-id", arn))["Grants"]
    assert {name: grant[name] for name in request} == request
    # What stands beside it wins; bytes are Base64.
    sealed = ["encrypt", "--cli-input-json", '{"KeyId": "absent", "Plaintext": "eA=="}', "--key-id", arn]
    blob = run(*sealed, "--output", "text", "--query", "CiphertextBlob").strip()
    assert run("decrypt", "--ciphertext-blob", blob, "--output", "text", "--query", "Plaintext") == "eA==\n"
    for text in ("[]", "{", '{"KeyId": 7}', '{"Plaintext": "?"}', '{"Unknown": 1}'):
        with pytest.raises(UsageError, match="--cli-input-json"):
            run("encrypt", "--cli-input-json", text)
    path.write_text(json.dumps(request | {"Constraints": {"EncryptionContextsubset": {"a": "b"}}}))
    with pytest.raises(UsageError, match=r"CreateGrant has no member Constraints\.EncryptionContextsubset"):
        run("create-grant", "--cli-input-json", f"file://{path}")


def test_inline_blobs_are_base64(run: Run):
    run("create-key", "--alias", "alias/ml", "--quiet")
    inline = ["encrypt", "--key-id", "alias/ml", "--query", "CiphertextBlob", "--output", "text"]
    for words in (
        ["--plaintext", "aGVsbG8="],
        ["--plaintext", "hello", "--cli-binary-format", "raw-in-base64-out"],
    ):
        blob = run(*inline, *words).strip()
        opened = run("decrypt", "--ciphertext-blob", blob, "--query", "Plaintext", "--output", "text")
        assert base64.b64decode(opened) == b"hello"
    with pytest.raises(UsageError, match="not Base64"):
        run(*inline, "--plaintext", "hello!")


@pytest.mark.parametrize("page", [[], ["--page-size", "1"], ["--page-size", "2"], ["--page-size", "9"]])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
def test_a_list_in_parts_as_the_aws_cli_cuts_it(run: Run, page: list[str], most: int):
    for _ in range(5):
        run("create-key", "--quiet")
    whole = json.loads(run("list-keys", *page))["Keys"]
    assert len(whole) == 5
    found: list[object] = []
    token: list[str] = []
    for _ in range(-(-5 // most)):
        part = json.loads(run("list-keys", *page, "--max-items", str(most), *token))
        assert len(part["Keys"]) == min(most, 5 - len(found))
        found += part["Keys"]
        token = ["--starting-token", part.get("NextToken", "")]
    assert found == whole
    assert part.keys() == {"Keys"}
    for words in (["--limit", "1"], ["--no-paginate"], ["--starting-token", "x"]):
        with pytest.raises(UsageError, match="--starting-token"):
            run("list-keys", "--max-items", "2", *words)


def test_structures_and_lists(run: Run):
    key_id = json.loads(run("create-key", "--tags", "TagKey=team,TagValue=ml", "TagKey=x,TagValue=y"))[
        "KeyMetadata"
    ]["KeyId"]
    assert len(json.loads(run("list-resource-tags", "--key-id", key_id))["Tags"]) == 2
    for operations in (["Decrypt", "Encrypt"], ["Decrypt,Encrypt"], ['["Decrypt", "Encrypt"]']):
        run(
            "create-grant", "--key-id", key_id, "--grantee-principal", "arn:aws:iam::000000000000:user/a",
            "--operations", *operations, "--constraints", "EncryptionContextSubset={a=b,c=d}",
        )  # fmt: skip
    grants = json.loads(run("list-grants", "--key-id", key_id))["Grants"]
    assert {tuple(grant["Operations"]) for grant in grants} == {("Decrypt", "Encrypt")}
    assert all(grant["Constraints"] == {"EncryptionContextSubset": {"a": "b", "c": "d"}} for grant in grants)
    lines = run("list-keys", "--output", "text").splitlines()
    assert lines == [f"KEYS\tarn:aws:kms:local:000000000000:key/{key_id}\t{key_id}"]


TAGS = ["tag-resource", "--key-id", "x", "--tags"]
GRANT = ["create-grant", "--key-id", "x", "--grantee-principal", "arn:aws:iam::000000000000:user/a",
         "--operations", "Decrypt", "--constraints"]  # fmt: skip
ENCRYPT = ["encrypt", "--key-id", "x", "--plaintext", "eA==", "--encryption-context"]
ERRORS: dict[str, tuple[list[str], type[Exception], str]] = {
    "no such key": (
        ["describe-key", "--key-id", "alias/none"],
        KeyAccessError,
        "NotFoundException.*list-aliases",
    ),
    "altered blob": (["decrypt", "--ciphertext-blob", "AAAA"], WrappedKeyError, "does not open"),
    "bad request": (
        ["generate-data-key", "--key-id", "alias/ml"],
        StreamcryptError,
        "Please specify either number of bytes or key spec",
    ),
    "no file": (
        ["encrypt", "--key-id", "x", "--plaintext", "fileb:///none"],
        StreamcryptError,
        "cannot be read",
    ),
    # Words that make no request are a usage error (exit code 2), as everywhere.
    "unknown KMS": (["list-keys", "--kms", "remote"], UsageError, "is no KMS"),
    "no number": (["list-keys", "--limit", "many"], UsageError, "not a whole number"),
    "no pair": (
        ["encrypt", "--key-id", "x", "--plaintext", "AA==", "--encryption-context", "x"],
        UsageError,
        "is not NAME",
    ),
    "no JSON": (
        ["create-grant", "--key-id", "x", "--grantee-principal", "x", "--operations", "[x"],
        UsageError,
        "not JSON",
    ),
    "no time": (
        [
            "import-key-material",
            "--key-id",
            "x",
            "--import-token",
            "AA==",
            "--encrypted-key-material",
            "AA==",
            "--valid-to",
            "soon",
        ],
        UsageError,
        "is not a time",
    ),
    "no request": (["generate-data-key", "--cli-input-json", "[]"], UsageError, "not a JSON object"),
    "no member": (["generate-data-key", "--cli-input-json", '{"Key": "x"}'], UsageError, "has no member Key"),
    "no query": (["list-keys", "--query", "Keys["], UsageError, "--query"),
    "a number for text": ([*TAGS, '[{"TagKey": 1, "TagValue": "x"}]'], UsageError, "tagKey must be a str"),
    "no structure": ([*TAGS, "[1]"], UsageError, "must be a dict"),
    "no text in a context": ([*ENCRYPT, '{"a": 1}'], UsageError, "must map str to str"),
    "a name twice": ([*ENCRYPT, "a=1,a=2"], UsageError, "two values of a"),
    # A constraint that is misspelt must not become none.
    "no such constraint": (
        [*GRANT, "EncryptionContextsubset={a=b}"],
        UsageError,
        "constraints has no member EncryptionContextsubset; it has EncryptionContextEquals",
    ),
}


@pytest.mark.parametrize(("words", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_errors(run: Run, words: list[str], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        run(*words)


def test_a_context_whose_value_has_a_comma(run: Run):
    run("create-key", "--alias", "alias/ml", "--quiet")
    inline = ["encrypt", "--key-id", "alias/ml", "--plaintext", "eA==", "--query", "CiphertextBlob"]
    blob = json.loads(run(*inline, "--encryption-context", 'a="x,{y",b=z'))
    run("decrypt", "--ciphertext-blob", blob, "--encryption-context", '{"a": "x,{y", "b": "z"}')


def test_boto3_s_own_refusal_is_no_key_s_fault(run: Run, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with pytest.raises(StreamcryptError, match="Limit, value: 0, valid min value: 1") as caught:
        run("list-keys", "--kms", "local@http://127.0.0.1:1", "--limit", "0")
    assert not isinstance(caught.value, KeyAccessError)


def test_a_terminal_is_shown_no_control_characters(run: Run, monkeypatch: pytest.MonkeyPatch):
    described = "f\u00fcr\u202e\x1b[2J\x9b1m\U000e0001\x7f"
    made = json.loads(run("create-key", "--description", described))["KeyMetadata"]
    assert made["Description"] == described
    show = ("describe-key", "--key-id", made["KeyId"], "--query", "KeyMetadata.Description")
    assert run(*show, "--output", "text") == described + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for words in (show, (*show, "--output", "text")):
        shown = run(*words)
        assert shown.strip().isprintable(), ascii(shown)
        assert "f\u00fcr" in shown
    assert json.loads(run(*show)) == described


def test_a_refusal_names_the_statement_and_the_condition(run: Run, home: Path):
    key_id = json.loads(run("create-key", "--quiet"))["KeyMetadata"]["KeyId"]
    root = {"AWS": "arn:aws:iam::000000000000:root"}
    everything = {"Effect": "Allow", "Principal": root, "Action": "kms:*", "Resource": "*"}
    condition = {"StringEquals": {"kms:EncryptionContext:Stage": "train"}}
    administer = everything | {"Action": ["kms:PutKeyPolicy", "kms:Describe*"]}
    training = everything | {"Sid": "Training", "Condition": condition}
    denying = everything | {
        "Sid": "No training",
        "Effect": "Deny",
        "Action": "kms:Gen*",
        "Condition": condition,
    }
    cases = (
        ("Stage=test", (administer, training), "Training: StringEquals kms:EncryptionContext:Stage .train., "
         "and the request has 'test'; the caller needs kms:GenerateDataKey"),
        ("Stage=train", (everything, denying), "No training of the key policy denies it; a Deny statement covers"),
    )  # fmt: skip
    for context, statements, words in cases:
        document = json.dumps({"Version": "2012-10-17", "Statement": statements})
        run("put-key-policy", "--key-id", key_id, "--policy", document)
        with pytest.raises(KeyAccessError, match=f"AccessDeniedException.*{words}"):
            encrypt_bytes(b"x", keys=f"local:{key_id}", context=dict([context.split("=")]))


def test_a_throttle_is_temporary(run: Run):
    open_service().simulation = Simulation(rate=1e-9)
    run("list-keys")
    with pytest.raises(KeyUnavailableError, match="Reduce the frequency"):
        run("list-keys")


def test_env(run: Run, home: Path, capsys: pytest.CaptureFixture[str]):
    lines = run("env", "--user", "alice", "--port", "9999").splitlines()
    variables = dict(re.fullmatch(r"export (\w+)=(\S+)", line).groups() for line in lines)  # type: ignore[union-attr]
    assert variables["AWS_ENDPOINT_URL_KMS"] == "http://127.0.0.1:9999"
    assert variables["AWS_DEFAULT_REGION"] == "local"
    again = json.loads(run("env", "--user", "alice", "--port", "9999", "--json"))
    assert again == {name: value.strip("'") for name, value in variables.items()}
    assert json.loads(run("env", "--json"))["AWS_ACCESS_KEY_ID"] != again["AWS_ACCESS_KEY_ID"]
    with pytest.raises(UsageError, match="--user"):
        run("env", "--user", "no such name!")
    assert capsys.readouterr().out == ""


def test_a_signature_or_mac_that_does_not_hold_did_not_authenticate(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    """Exit code 3, as the interface says, and not that of a key that could not be used."""
    for spec, usage, sign, made in (
        ("ECC_NIST_P256", "SIGN_VERIFY", "sign", "signature"),
        ("HMAC_256", "GENERATE_VERIFY_MAC", "generate-mac", "mac"),
    ):
        assert main(["kms", "create-key", "--key-spec", spec, "--key-usage", usage, "--quiet"]) == 0
        key = json.loads(capsys.readouterr().out)["KeyMetadata"]["KeyId"]
        algorithm = (
            ("--signing-algorithm", "ECDSA_SHA_256")
            if made == "signature"
            else ("--mac-algorithm", "HMAC_SHA_256")
        )
        assert main(["kms", sign, "--key-id", key, "--message", "aGVsbG8=", *algorithm]) == 0
        proof = json.loads(capsys.readouterr().out)[made.title()]
        verify = ["kms", "verify" if made == "signature" else "verify-mac", "--key-id", key, *algorithm]
        assert main([*verify, f"--{made}", proof, "--message", "aGVsbG8="]) == 0
        assert main([*verify, f"--{made}", proof, "--message", "aGVsbG9v"]) == 3
        assert "does not hold" in capsys.readouterr().err


def test_audit_and_cost(run: Run):
    run("create-key", "--alias", "alias/ml")
    run("encrypt", "--key-id", "alias/ml", "--plaintext", "aGVsbG8=", "--encryption-context", "Stage=train")
    (event,) = (
        json.loads(line) for line in run("audit", "--operation", "Encrypt", "--since", "1h").splitlines()
    )
    assert event["requestParameters"]["encryptionContext"] == {"Stage": "train"}
    assert run("audit", "--context", "Stage=test") == ""
    assert len(json.loads(run("audit", "--json"))["Records"]) == 3
    bill = json.loads(run("cost", "--json"))
    assert bill["requests"] == 3
    assert "total" in run("cost")


def test_backup_and_restore(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run("create-key", "--alias", "alias/ml")
    blob = run(
        "encrypt",
        "--key-id",
        "alias/ml",
        "--plaintext",
        "aGVsbG8=",
        "--query",
        "CiphertextBlob",
        "--output",
        "text",
    )
    (tmp_path / "words").write_text("correct horse\n")
    words = ["--passphrase-file", str(tmp_path / "words")]
    run("backup", str(tmp_path / "backup"), *words)
    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "restored"))
    run("restore", str(tmp_path / "backup"), *words)
    opened = run("decrypt", "--ciphertext-blob", blob.strip(), "--query", "Plaintext", "--output", "text")
    assert base64.b64decode(opened) == b"hello"


def test_a_backup_without_a_passphrase_is_told_what_it_lacks(run: Run, tmp_path: Path):
    run("create-key", "--quiet")
    with pytest.raises(
        KeyAccessError, match=r"backup: a backup is sealed .* --passphrase-file .* --root-key-in-clear"
    ):
        run("backup", str(tmp_path / "backup"))
    assert not list(tmp_path.glob("*backup*"))
    (tmp_path / "words").write_text("correct horse\n")
    run("backup", str(tmp_path / "backup"), "--passphrase-file", str(tmp_path / "words"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCRYPT_HOME", str(tmp_path / "restored"))
        with pytest.raises(KeyAccessError, match="--passphrase-file or in STREAMCRYPT_PASSPHRASE_FILE"):
            run("restore", str(tmp_path / "backup"))


@pytest.mark.parametrize("alias", ["alias/ml", "ml"], ids=["taken", "no alias's name"])
def test_a_key_whose_alias_cannot_be_made_does_not_stay(run: Run, alias: str):
    run("create-key", "--alias", "alias/ml", "--quiet")
    with pytest.raises(StreamcryptError, match="is scheduled for deletion, since its alias was not"):
        run("create-key", "--alias", alias, "--quiet")
    keys = [key["KeyId"] for key in json.loads(run("list-keys"))["Keys"]]
    states = [json.loads(run("describe-key", "--key-id", key))["KeyMetadata"]["KeyState"] for key in keys]
    assert sorted(states) == ["Enabled", "PendingDeletion"]


@pytest.mark.parametrize("command", ["serve", "env"])
@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_port_that_is_none(command: str, port: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parser().parse_args(["kms", command, f"--port={port}"])
    assert f"'{port}' is not a port" in capsys.readouterr().err


def test_branch_keys(run: Run):
    arn = json.loads(run("create-key", "--alias", "alias/ml", "--quiet"))["KeyMetadata"]["Arn"]
    made = json.loads(
        run(
            "create-branch-key",
            "--key-id",
            "alias/ml",
            "--branch-key-id",
            "tenant-a",
            "--encryption-context",
            "t=a",
        )
    )
    assert made["KeyReference"] == "hierarchy:tenant-a@local"
    message = encrypt_bytes(b"x", keys=made["KeyReference"])
    rotated = json.loads(run("version-branch-key", "--branch-key-id", "tenant-a", "--key-id", arn))
    assert rotated["Version"] != made["Version"]
    assert decrypt_bytes(message, keys=made["KeyReference"]) == b"x"
    run("create-branch-key", "--key-id", arn)
    found = json.loads(run("list-branch-keys"))["BranchKeys"]
    assert len(found) == 2
    (active,) = [entry for entry in found if entry["BranchKeyId"] == "tenant-a"]
    assert (active["Version"], active["KmsArn"], active["EncryptionContext"]) == (
        rotated["Version"],
        arn,
        {"t": "a"},
    )
    versions = json.loads(run("list-branch-keys", "--branch-key-id", "tenant-a"))["BranchKeys"]
    assert [entry["Version"] for entry in versions] == [made["Version"], rotated["Version"]]
    with pytest.raises(KeyAccessError, match="exists already"):
        run("create-branch-key", "--key-id", arn, "--branch-key-id", "tenant-a")
    with pytest.raises(KeyAccessError, match="the store has no"):
        run("version-branch-key", "--branch-key-id", "none")
    with pytest.raises(ValueError, match="needs no table"):
        run("create-branch-key-store", "--store", "local")


def test_branch_keys_in_dynamodb(run: Run, monkeypatch: pytest.MonkeyPatch):
    moto = pytest.importorskip("moto.server", reason="moto[server] IS MISSING: no DynamoDB")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "eu-central-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        store = ["--store", "dynamodb:BranchKeys?logical=production"]
        assert json.loads(run("create-branch-key-store", *store)) == {"TableName": "BranchKeys"}
        run("create-key", "--kms", "aws")
        key = json.loads(run("list-keys", "--kms", "aws"))["Keys"][0]["KeyId"]
        made = json.loads(run("create-branch-key", "--key-id", key, "--kms", "aws", *store))
        rotated = json.loads(run("version-branch-key", "--branch-key-id", made["BranchKeyId"], *store))
        (active,) = json.loads(run("list-branch-keys", *store))["BranchKeys"]
        assert (active["BranchKeyId"], active["Version"]) == (made["BranchKeyId"], rotated["Version"])
        versions = json.loads(run("list-branch-keys", "--branch-key-id", made["BranchKeyId"], *store))[
            "BranchKeys"
        ]
        assert {entry["Version"] for entry in versions} == {made["Version"], rotated["Version"]}
    finally:
        server.stop()


@pytest.mark.parametrize(
    "words",
    [
        ("kms", "list-keys", "--kms", "aws"),
        ("bench", "kms", "--kms", "http://127.0.0.1:9", "--seconds", "1"),
    ],
)
def test_a_kms_out_of_reach_is_worth_another_try(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
):
    for name, value in {
        "AWS_ENDPOINT_URL_KMS": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "eu-central-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    assert main(words) == 5
    told = capsys.readouterr().err
    assert "Could not connect to the endpoint URL" in told
    assert "key of the ciphertext" not in told


def test_a_refusal_without_a_key_names_the_operation(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "no-such-file")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it keeps the credentials that another test had
    assert main(("kms", "list-keys", "--kms", "aws")) == 4
    assert (
        "streamcrypt: error: kms list-keys: cannot call KMS (NoCredentialsError)" in capsys.readouterr().err
    )


def test_a_reminder_until_the_backup(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def create() -> str:
        args = parser().parse_args(["kms", "create-key"])
        args.run(args)
        return capsys.readouterr().err

    assert "kms backup" in create()
    run("backup", str(tmp_path / "backup"), "--root-key-in-clear", "--quiet")
    assert create() == ""


def test_serve_refuses_another_address(run: Run, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UsageError, match="not a loopback address"):
        run("serve", "--host", "0.0.0.0", "--port", "0")
    assert capsys.readouterr().out == ""


def start(*words: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "streamcrypt", "kms", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_ctrl_c_ends_audit_follow_as_interrupted(run: Run):
    run("create-key", "--quiet")
    following = start("audit", "--follow")
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["eventName"] == "CreateKey"
    run("list-keys")
    assert json.loads(following.stdout.readline())["eventName"] == "ListKeys"
    following.send_signal(signal.SIGINT)
    assert following.wait(20) == 130
    following.stdout.close()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 130)]
)
def test_serve_prints_its_url_and_answers(home: Path, number: signal.Signals, code: int):
    server = start("serve", "--port", "0")
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        args: Any = parser().parse_args(
            ["kms", "create-key", "--kms", f"local@{url}", "--alias", "alias/far"]
        )
        assert args.run(args) == 0
        assert open_service().describe_key(KeyId="alias/far")["KeyMetadata"]["Enabled"]
    finally:
        server.send_signal(number)
        assert server.wait(20) == code
        server.stdout.close()
