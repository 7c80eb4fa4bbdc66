"""Key references: one string names a key.

    local:alias/NAME   local:KEY-ID   arn:aws:kms:local:…     a key of the embedded KMS
    local:…@http://HOST:PORT                                  the same through a running ``kms serve``
    arn:PARTITION:kms:REGION:ACCOUNT:key/ID   …:alias/NAME    AWS KMS; a multi-Region key stands for
    aws:alias/NAME     aws:KEY-ID                             all its replicas
    aws:discovery[?partition=P&accounts=A,B][&mrk=yes&region=R]    decrypts with the key that the
    local:discovery                                           message names
    kms-rsa:KEY-ARN[@PUBLIC.pem][?padding=oaep-sha1]          RSA key of a KMS; wraps without any call
                                                              when the public key is given
    raw-aes:NAMESPACE/NAME@FILE                               16, 24 or 32 bytes in a file
    raw-rsa:NAMESPACE/NAME@FILE.pem[?padding=…]               public key encrypts, private key decrypts
    ecdh:FILE.pem&recipient=FILE.pem                          own private key and the other's public key
    ecdh:FILE.pem                                             decrypts what was wrapped for this private key
    ecdh:ephemeral&recipient=FILE.pem                         encrypts; only the recipient decrypts
    ecdh:KMS-KEY[&recipient=FILE.pem]                         KMS-KEY a local:, aws: or arn: key for
                                                              key agreement, as either of the files
    hierarchy:BRANCH-KEY-ID@local                             branch keys kept in this home
    hierarchy:BRANCH-KEY-ID@dynamodb:TABLE[?logical=NAME]     in DynamoDB, in AWS's schema; also
                                                              &region=REGION, &kms=KEY-ARN, &ttl=5m

A reference that is not understood is a ValueError; a key file that cannot be used is a
KeyAccessError.  Nothing is asked of a KMS before a data key is, but the public key or the ARN of
an asymmetric key.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from streamcrypt.errors import KeyAccessError, StreamcryptError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsCalls, KmsStats
from streamcrypt.keys.keyring import Keyring, MultiKeyring, printable
from streamcrypt.keys.kms import KeyArn, KmsDiscoveryKeyring, KmsKeyring, KmsRsaKeyring, is_multi_region
from streamcrypt.kms import home_folder, kms_client, open_service
from streamcrypt.kms.store import BRANCH_KEYS_NAME, FOLDER_NAME
from streamcrypt.units import parse_duration

# A command uses one kind of key: the others' modules are imported by the functions that need them
# (benchmarks/README.md, "start-up").
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    from streamcrypt.keys.hierarchy import BranchKeyStore, BranchKeyTable

LOCAL_REGION: Final = "local"
PLAINTEXT_HTTP_VARIABLE: Final = "STREAMCRYPT_ALLOW_PLAINTEXT_HTTP"

_FORMS: Final = (
    "local:alias/NAME, a KMS key ARN, aws:alias/NAME, raw-aes:NAMESPACE/NAME@FILE "
    "or raw-rsa:NAMESPACE/NAME@FILE.pem"
)

References = str | Keyring | Sequence[str | Keyring]


def encrypting_keyring(references: References, *, stats: KmsStats | None = None) -> Keyring:
    """The keyring to encrypt with: the first key makes the data key, every one wraps it."""
    if (kept := _kept_keyring(references, encrypting=True)) is not None:
        return kept
    keyrings = [_from(reference, encrypting=True, stats=stats) for reference in _as_list(references)]
    if not keyrings:
        raise ValueError(f"encrypting needs a key: {_FORMS}")
    _refuse_repeated_replicas(keyrings)
    return keyrings[0] if len(keyrings) == 1 else MultiKeyring(keyrings[0], keyrings[1:])


def decrypting_keyring(references: References | None, *, stats: KmsStats | None = None) -> Keyring:
    """The keyring to decrypt with: any of the keys opens.

    None: AWS and local keys are found by the ARN in the message.  An alias or key ID stands for the
    key that it names now (DescribeKey).
    """
    if references is None:
        return _discovery("local and AWS", stats, {})
    if (kept := _kept_keyring(references, encrypting=False)) is not None:
        return kept
    keyrings = [_from(reference, encrypting=False, stats=stats) for reference in _as_list(references)]
    if not keyrings:
        raise ValueError(
            "an empty list of keys opens nothing; leave it out to find keys by the message's ARNs"
        )
    _refuse_repeated_replicas(keyrings)
    return keyrings[0] if len(keyrings) == 1 else MultiKeyring(None, keyrings)


def _as_list(references: References) -> list[str | Keyring]:
    return [references] if isinstance(references, str | Keyring) else list(references)


def _refuse_repeated_replicas(keyrings: Sequence[Keyring]) -> None:
    seen = set()
    for keyring in keyrings:
        if isinstance(keyring, KmsKeyring) and is_multi_region(keyring.key_id):
            key = keyring.key_id.rpartition("/")[2]
            if key in seen:
                raise ValueError(f"multi-Region key {key} is given twice; its replicas are one key")
            seen.add(key)


def _from(reference: str | Keyring, *, encrypting: bool, stats: KmsStats | None) -> Keyring:
    if isinstance(reference, Keyring):
        return reference
    if not isinstance(reference, str):
        raise TypeError(f"a key is a reference or a Keyring, not {type(reference).__name__}")
    kind, colon, rest = reference.partition(":")
    if colon and rest:
        if kind in ("local", "aws", "arn"):
            return _kms(reference, encrypting=encrypting, stats=stats)
        if kind == "kms-rsa":
            return _kms_rsa(rest, stats=stats)
        if kind == "ecdh":
            return _ecdh(reference, rest, encrypting=encrypting, stats=stats)
        if kind == "hierarchy":
            return _hierarchy(reference, rest, stats=stats)
        if kind == "raw-aes":
            return _keep(reference, encrypting, lambda: _raw_aes(reference, rest))
        if kind == "raw-rsa":
            return _keep(reference, encrypting, lambda: _raw_rsa(reference, rest, encrypting=encrypting))
    raise ValueError(f"{printable(reference)!r}: not a key reference; write {_FORMS}")


# KMS keys


def _kms(reference: str, *, encrypting: bool, stats: KmsStats | None) -> Keyring:
    where, _, _ = reference.partition("?")
    if where in ("aws:discovery", "local:discovery"):
        if encrypting:
            raise ValueError(f"{where} only decrypts; name the key to encrypt with")
        allowed = ("partition", "accounts", *(("mrk", "region") if where == "aws:discovery" else ()))
        text, options = _split_options(reference, allowed)
        if text != where:  # no option, but what begins as one
            raise ValueError(
                f"{printable(reference)!r}: options are written name=value; known here: {', '.join(allowed)}"
            )
        if options.get("mrk", "yes") != "yes" or ("region" in options and "mrk" not in options):
            raise ValueError(f"{printable(reference)!r}: write mrk=yes, and region= only with it")
        return _discovery(where.partition(":")[0], stats, options)
    text, options = _split_options(reference, ("allow-plaintext-http",))
    calls, key_id = _reach(text, options, stats)
    return KmsKeyring(calls, key_id, multi_region=is_multi_region(key_id), resolve=True, label=text)


def reach_kms(reference: str, *, stats: KmsStats | None = None) -> tuple[KmsCalls, str]:
    """The KMS behind a ``local:``, ``aws:`` or ``arn:`` reference, and the key's identifier there.

    ValueError for every other form: it names no key of a KMS.
    """
    if reference.partition(":")[0] not in ("local", "aws", "arn"):
        raise ValueError(f"{printable(reference)!r} names no key of a KMS")
    text, options = _split_options(reference, ("allow-plaintext-http",))
    return _reach(text, options, stats)


def _reach(text: str, options: Mapping[str, str], stats: KmsStats | None) -> tuple[KmsCalls, str]:
    """The KMS that a ``local:``, ``aws:`` or ``arn:`` reference points to, and the key's identifier there."""
    body, _, endpoint = text.partition("@")
    if body.startswith("arn:"):
        key_id = body
        local = KeyArn.parse(body).region == LOCAL_REGION
    else:
        kind, _, key_id = body.partition(":")
        local = kind == "local"
    if key_id.startswith("arn:"):
        arn = KeyArn.parse(key_id)
        if local != (arn.region == LOCAL_REGION) and not endpoint:
            raise ValueError(f"{printable(text)!r}: a key of region {arn.region!r} is not reached that way")
        region: str | None = arn.region
    else:
        region = None
        if "/" in key_id and not key_id.startswith("alias/"):
            raise ValueError(
                f"{printable(text)!r}: not a key reference; write alias/NAME, a key ID or an ARN"
            )
    if not key_id:
        raise ValueError(f"{printable(text)!r}: names no key; write {_FORMS}")
    if endpoint:
        if not local:
            raise ValueError(
                f"{printable(text)!r}: only local: keys take @URL; for AWS KMS set AWS_ENDPOINT_URL_KMS"
            )
        allowed = options.get("allow-plaintext-http") == "yes"
        check_endpoint(endpoint, plaintext_allowed=allowed)
        return aws_calls(LOCAL_REGION, stats, endpoint=endpoint, plaintext_allowed=allowed), key_id
    return (local_calls(stats) if local else aws_calls(region, stats)), key_id


def kms_options(reference: str, region: str) -> str:
    """What sends a ``streamcrypt kms …`` command to the KMS of a ``local:``, ``aws:`` or ``arn:`` reference."""
    endpoint = _split_options(reference, ("allow-plaintext-http",))[0].partition("@")[2]
    if endpoint:
        return f" --kms local@{endpoint}"
    return "" if region == LOCAL_REGION else f" --kms aws --region {region}"


def _discovery(where: str, stats: KmsStats | None, options: Mapping[str, str]) -> Keyring:
    accounts = [account for account in options.get("accounts", "").split(",") if account]
    partition = options.get("partition", "aws" if accounts else None)
    if partition is not None and not accounts:
        raise ValueError(
            "discovery with a partition needs accounts as well: ?partition=aws&accounts=111122223333"
        )
    if options.get("mrk") == "yes":
        return KmsDiscoveryKeyring(
            aws_calls(options.get("region"), stats), partition=partition, accounts=accounts, multi_region=True
        )
    reached: dict[str, KmsCalls] = {}

    def reach(arn: KeyArn) -> KmsCalls | None:
        is_local = arn.region == LOCAL_REGION
        if ("local" if is_local else "aws") not in where.lower():
            return None
        if arn.region not in reached:
            reached[arn.region] = local_calls(stats) if is_local else aws_calls(arn.region, stats)
        return reached[arn.region]

    identity = (where, home_folder(), _environment())
    return KmsDiscoveryKeyring(reach, partition=partition, accounts=accounts, identity=identity)


def _kms_rsa(rest: str, *, stats: KmsStats | None) -> Keyring:
    from streamcrypt.keys.raw import DEFAULT_RSA_PADDING

    text, options = _split_options(rest, ("padding",))
    key, _, file = text.partition("@")
    padding = options.get("padding", DEFAULT_RSA_PADDING)
    public_key = _rsa_public_key(file, f"kms-rsa:{key}") if file else None
    calls, key_id = _reach(key, {}, stats)
    if not key_id.startswith("arn:") or KeyArn.parse(key_id).kind != "key":
        # The message must name the key by its ARN.
        key_id = KmsKeyring(calls, key_id, resolve=True).key_arn()
    return KmsRsaKeyring(key_id, public_key=public_key, client=calls, padding=padding)


def _ecdh(reference: str, rest: str, *, encrypting: bool, stats: KmsStats | None) -> Keyring:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from streamcrypt.keys.ecdh import EphemeralEcdhKeyring, KmsEcdhKeyring, RawEcdhKeyring

    own, *items = rest.split("&")
    names = dict(item.partition("=")[::2] for item in items)
    if set(names) - {"recipient"}:
        raise ValueError(f"{printable(reference)!r}: write ecdh:FILE.pem&recipient=FILE.pem")
    recipient = _ec_public_key(names["recipient"], reference) if "recipient" in names else None
    if encrypting and recipient is None:
        raise ValueError(
            f"{printable(reference)!r}: encrypting needs the other's public key: &recipient=FILE.pem"
        )
    if own == "ephemeral":
        if recipient is None or not encrypting:
            raise ValueError("ecdh:ephemeral only encrypts, and needs &recipient=FILE.pem")
        return EphemeralEcdhKeyring(recipient)
    if own.partition(":")[0] in ("local", "aws", "arn"):
        calls, key_id = _reach(own, {}, stats)
        return KmsEcdhKeyring(calls, key_id, recipient, label=own)
    path = own
    private_key = load_private_key(_read_key_file(path, reference, private=True), path)
    if not isinstance(private_key, EllipticCurvePrivateKey):
        raise KeyAccessError(f"{path}: not an elliptic-curve key; ecdh: needs one on P-256, P-384 or P-521")
    return RawEcdhKeyring(private_key, recipient)


def _ec_public_key(path: str, reference: str) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    pem = _read_key_file(path, reference, private=False)
    if b"PRIVATE KEY" in pem:
        raise KeyAccessError(f"{path}: a private key; &recipient= takes the other's public key")
    public_key = load_public_key(pem, path)
    if not isinstance(public_key, EllipticCurvePublicKey):
        raise KeyAccessError(f"{path}: not an elliptic-curve public key; &recipient= needs one")
    return public_key


def _hierarchy(reference: str, rest: str, *, stats: KmsStats | None) -> Keyring:
    from streamcrypt.keys.hierarchy import HierarchyKeyring

    branch_key_id, at, place = rest.partition("@")
    if not (branch_key_id and at and place):
        raise ValueError(
            f"{printable(reference)!r}: not a key reference; write hierarchy:BRANCH-KEY-ID@local "
            "or hierarchy:BRANCH-KEY-ID@dynamodb:TABLE"
        )
    store, ttl = _branch_key_store(place, stats)
    return HierarchyKeyring(store, branch_key_id, cache=_branch_keys_for(ttl))


def branch_key_store(
    place: str, *, kms_key_arn: str | None = None, stats: KmsStats | None = None
) -> BranchKeyStore:
    """The store that ``local`` or ``dynamodb:TABLE?…`` names, to make and rotate branch keys in.

    ``kms_key_arn`` is the KMS key that wraps new ones.
    """
    return _branch_key_store(place, stats, kms_key_arn)[0]


def make_branch_key_table(place: str) -> str:
    """Make the table of ``dynamodb:TABLE?…``; its name.  ValueError for ``local``, which needs none."""
    from streamcrypt.keys.hierarchy import DynamoBranchKeyTable

    table = _branch_key_table(*_split_options(place, _STORE_OPTIONS))
    if not isinstance(table, DynamoBranchKeyTable):
        raise ValueError(f"{printable(place)!r} needs no table; it is made with its first branch key")
    table.create_table()
    return table.name


_STORE_OPTIONS: Final = ("logical", "region", "kms", "ttl")


def _branch_key_table(text: str, options: Mapping[str, str]) -> BranchKeyTable:
    from streamcrypt.keys.hierarchy import DynamoBranchKeyTable, SqliteBranchKeyTable
    from streamcrypt.kms import default_home

    if text == "local":
        return SqliteBranchKeyTable(default_home() / FOLDER_NAME / BRANCH_KEYS_NAME)
    if not text.startswith("dynamodb:") or text == "dynamodb:":
        raise ValueError(f"{printable(text)!r} is not a branch-key store; write local or dynamodb:TABLE")
    environment, region = _environment(), options.get("region")

    def connect() -> Any:
        return _shared_client("dynamodb", region, None, environment, plaintext_allowed=False)

    return DynamoBranchKeyTable(connect, text.partition(":")[2], identity=(region, environment))


def _branch_key_store(
    place: str, stats: KmsStats | None, kms_key_arn: str | None = None
) -> tuple[BranchKeyStore, float]:
    from streamcrypt.keys.hierarchy import DEFAULT_TTL, BranchKeyStore

    text, options = _split_options(place, _STORE_OPTIONS)
    ttl = parse_duration(options["ttl"]) if "ttl" in options else DEFAULT_TTL
    kms_key_arn = kms_key_arn or options.get("kms")
    table = _branch_key_table(text, options)
    logical_name = options.get("logical", "streamcrypt" if text == "local" else text.partition(":")[2])

    def reach(arn: KeyArn) -> KmsCalls:
        return local_calls(stats) if arn.region == LOCAL_REGION else aws_calls(arn.region, stats)

    return BranchKeyStore(table, reach, logical_name=logical_name, kms_key_arn=kms_key_arn), ttl


_branch_keys: dict[float, DataKeyCache] = {}


def _branch_keys_for(ttl: float) -> DataKeyCache:
    """Branch keys of this process: one KMS call serves all jobs until they expire."""
    return _branch_keys.setdefault(ttl, DataKeyCache(max_age=ttl))


def local_calls(stats: KmsStats | None = None) -> KmsCalls:
    """The embedded KMS of this home, in this process."""
    home = os.path.abspath(home_folder())

    def connect() -> Any:
        try:
            return open_service(home, create=False)
        except StreamcryptError as error:
            if isinstance(error, KeyAccessError):
                raise
            there = os.path.lexists(os.path.join(home, FOLDER_NAME))
            hint = "" if there else "; make a key first: streamcrypt kms create-key --alias alias/NAME"
            raise KeyAccessError(f"{error}{hint}") from error

    return KmsCalls(connect, stats=stats, name="the embedded KMS", identity=("local", home))


def aws_calls(
    region: str | None,
    stats: KmsStats | None = None,
    *,
    endpoint: str | None = None,
    plaintext_allowed: bool = False,
) -> KmsCalls:
    """AWS KMS in ``region`` (None: boto3's own), or another KMS at ``endpoint``, through boto3.

    Profile, credentials, region, proxies, FIPS and AWS_ENDPOINT_URL_KMS are boto3's own affair.
    """
    environment = _environment()
    return KmsCalls(
        lambda: _shared_client("kms", region, endpoint, environment, plaintext_allowed=plaintext_allowed),
        stats=stats,
        name=f"KMS at {endpoint}" if endpoint else f"AWS KMS{f' in {region}' if region else ''}",
        identity=("aws", region, endpoint, environment),
    )


Environment = tuple[tuple[str, str], ...]


def _environment() -> Environment:
    """What boto3 reads from the environment: clients are shared only while it stays the same.

    Without values that are secrets; the access key ID changes with them.
    """

    def secret(name: str) -> bool:  # a token's file is none
        return "SECRET" in name or name.endswith("_TOKEN") or name.startswith("AWS_BEARER_TOKEN")

    return tuple(sorted(i for i in os.environ.items() if i[0].startswith("AWS_") and not secret(i[0])))


_clients: dict[tuple[Any, ...], Any] = {}
_clients_lock = threading.Lock()


def _shared_client(
    service: str,
    region: str | None,
    endpoint: str | None,
    environment: Environment,
    *,
    plaintext_allowed: bool,
) -> Any:
    """A boto3 client; one for all callers that ask for the same."""
    key = (service, region, endpoint, environment)
    with _clients_lock:
        client = _clients.get(key)
        if client is None:
            client = _clients[key] = _make_client(service, region, endpoint)
    check_endpoint(client.meta.endpoint_url, plaintext_allowed=plaintext_allowed)
    return client


def _make_client(service: str, region: str | None, endpoint: str | None) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ImportError("AWS keys need boto3: pip install boto3") from error
    from streamcrypt.kms.redaction import withhold_secrets_from_logs

    withhold_secrets_from_logs()
    # Attempts at KMS are ours to count and to pace (calls.Pace): one throttle must reach all threads.
    retries: Any = {"total_max_attempts": 1, "mode": "standard"} if service == "kms" else None
    # KMS answers in milliseconds; one that hangs is asked again soon (calls.py, "deadline").
    config = Config(
        retries=retries,
        connect_timeout=3,
        read_timeout=3 if service == "kms" else 10,
        max_pool_connections=64,
    )
    if service == "kms" and endpoint is not None:  # an embedded KMS elsewhere, or one of this home
        return kms_client(f"local@{endpoint}", config=config)
    session: Any = boto3.session.Session()  # boto3's stubs want a literal service name
    return session.client(service, region_name=region, endpoint_url=endpoint, config=config)


def _forget_in_child() -> None:
    global _clients_lock
    _clients_lock = threading.Lock()
    _clients.clear()  # a child must not write on its parent's connections


os.register_at_fork(after_in_child=_forget_in_child)


def check_endpoint(url: str, *, plaintext_allowed: bool = False) -> None:
    """ValueError for a KMS over plain HTTP outside this machine: data keys would cross the net in clear."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{printable(url)!r} is not a URL of a KMS; write http://127.0.0.1:8400 or https://HOST:PORT"
        )
    if parts.scheme == "https" or _is_loopback(parts.hostname):
        return
    if plaintext_allowed or os.environ.get(PLAINTEXT_HTTP_VARIABLE) == "yes":
        return
    raise ValueError(
        f"{printable(url)}: plain http:// to another machine would show data keys to the network; use https://, "
        f"or set {PLAINTEXT_HTTP_VARIABLE}=yes if the network itself is private"
    )


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


# Key files


def _kept_keyring(references: References, *, encrypting: bool) -> Keyring | None:
    """A single key that is at hand already: a Keyring, or a key file that has not changed since it was read."""
    if isinstance(references, str):
        kept = _raw_keyrings.get((references, encrypting))
        return kept[2] if kept is not None and _file_state(kept[0]) == kept[1] else None
    return references if isinstance(references, Keyring) else None


def _keep(reference: str, encrypting: bool, read: Callable[[], Keyring]) -> Keyring:
    """Reading a key file costs more than sealing a small message, so its keyring is kept."""
    path = reference.partition("@")[2]
    if reference.startswith("raw-rsa:"):
        path, _ = _split_options(path, ("padding",))
    state = _file_state(path)
    keyring = read()
    if state is not None and len(_raw_keyrings) < _KEPT_KEYRINGS:
        _raw_keyrings[reference, encrypting] = (path, state, keyring)
    return keyring


def _file_state(path: str) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


_KEPT_KEYRINGS: Final = 64
_raw_keyrings: dict[tuple[str, bool], tuple[str, tuple[int, int, int, int], Keyring]] = {}


def _raw_aes(reference: str, rest: str) -> Keyring:
    from streamcrypt.keys.raw import AES_KEY_LENGTHS, RawAesKeyring

    namespace, name, file = _raw_name(reference, rest)
    key = _read_key_file(file, reference, private=True)
    if len(key) not in AES_KEY_LENGTHS:
        raise KeyAccessError(
            f"{file}: {len(key)} bytes, and an AES wrapping key is 16, 24 or 32 raw bytes (no text, no newline); "
            "make one with: head -c 32 /dev/urandom > FILE"
        )
    return RawAesKeyring(namespace, name, key)


def _raw_rsa(reference: str, rest: str, *, encrypting: bool) -> Keyring:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

    from streamcrypt.keys.raw import DEFAULT_RSA_PADDING, RawRsaKeyring

    text, options = _split_options(rest, ("padding",))
    namespace, name, file = _raw_name(reference, text)
    padding = options.get("padding", DEFAULT_RSA_PADDING)
    path = file
    pem = _read_key_file(path, reference, private=False)
    if b"PRIVATE KEY" in pem:
        _warn_if_readable_by_all(path)
        private_key = load_private_key(pem, path)
        if not isinstance(private_key, RSAPrivateKey):
            raise KeyAccessError(f"{path}: not an RSA key; raw-rsa: needs one")
        return RawRsaKeyring(namespace, name, private_key=private_key, padding=padding)
    if not encrypting:
        raise KeyAccessError(f"{path}: a public key cannot decrypt; give the file with the private key")
    public_key = load_public_key(pem, path)
    if not isinstance(public_key, RSAPublicKey):
        raise KeyAccessError(f"{path}: not an RSA key; raw-rsa: needs one")
    return RawRsaKeyring(namespace, name, public_key=public_key, padding=padding)


def _rsa_public_key(path: str, reference: str) -> RSAPublicKey:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    pem = _read_key_file(path, reference, private=False)
    public_key = load_public_key(pem, path)
    if not isinstance(public_key, RSAPublicKey):
        raise KeyAccessError(f"{path}: not an RSA public key; kms-rsa: needs one (kms get-public-key)")
    return public_key


def _raw_name(reference: str, text: str) -> tuple[str, str, str]:
    names, at, file = text.partition("@")
    namespace, slash, name = names.partition("/")
    if not (at and slash and namespace and name and file):
        form = reference.partition(":")[0]
        raise ValueError(f"{printable(reference)!r}: not a key reference; write {form}:NAMESPACE/NAME@FILE")
    return namespace, name, file


def _read_key_file(path: str, reference: str, *, private: bool) -> bytes:
    if private:
        _warn_if_readable_by_all(path)
    try:
        with open(path, "rb") as file:
            key = file.read(_MAX_KEY_FILE + 1)
    except OSError as error:
        raise KeyAccessError(
            f"{printable(reference)}: key file {path} cannot be read ({error.strerror}); "
            "check the path after @ and its permissions"
        ) from error
    if len(key) > _MAX_KEY_FILE:
        raise KeyAccessError(f"{path}: too large for a key file")
    return key


_MAX_KEY_FILE: Final = 64 * 1024
_warned: set[str] = set()


def _warn_if_readable_by_all(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # opening it says why
    if mode & 0o004 and path not in _warned:
        _warned.add(path)
        import logging

        logging.getLogger("streamcrypt.keys").warning(
            "%s: this key file is readable by everyone on this machine; chmod 600 it", path
        )


def load_private_key(pem: bytes, path: str) -> Any:
    """The private key in ``pem``; KeyAccessError, without a word of its content, when there is none."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _load(lambda: load_pem_private_key(pem, password=None), path, "private key")


def load_public_key(pem: bytes, path: str) -> Any:
    """The public key in ``pem``, or KeyAccessError."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _load(lambda: load_pem_public_key(pem), path, "public key")


def _load(load: Callable[[], Any], path: str, what: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load()
    except TypeError as error:
        raise KeyAccessError(
            f"{path}: this {what} is protected by a password; decrypt it first (openssl pkey -in FILE)"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyAccessError(f"{path}: not a {what} in PEM form") from error


def _split_options(text: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """``body?name=value&name=value`` in its parts; a ``?`` that begins no known option is part of the body."""
    body, mark, tail = text.rpartition("?")
    if not mark or "=" not in tail:
        return text, {}
    options: dict[str, str] = {}
    for item in tail.split("&"):
        name, _, value = item.partition("=")
        if name not in allowed:
            raise ValueError(
                f"{printable(text)!r}: unknown option {printable(name)!r}; known here: {', '.join(allowed)}"
            )
        options[name] = value
    return body, options
