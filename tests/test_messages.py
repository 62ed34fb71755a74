"""Texts that leave the program: secrets in addresses are masked, control characters are made visible."""

import pytest

from dsmip.errors import StoreAway, UserError, refuse_secret
from dsmip.messages import has_secret, masked, printable, shown

SECRET = "hunter2/+x"
ADDRESSES = [
    f"s3://AKIA:{SECRET}@bucket/data",
    f"s3:/AKIA:{SECRET}@bucket/data",
    f"s3://AKIA%3A{SECRET}@bucket/data",
    f"ftp://me:{SECRET}@host:21/data",
    f"https://:{SECRET}@host/data",
    "s3://AKIA:1234/hunter2@bucket/data",
    "gs:/me:1234/hunter2@bucket/data",
    "abfss://me:1/hunter2@bucket/data",
    "ftp://me:123456/hunter2@host/data",
    "https://hunter2@host/data",
    f"ftp://me:p@{SECRET}@host/data",
    "https://host/x?X-Amz-Credential=me&X-Amz-Signature=hunter2",
    "https://host/x?page=2&sig=hunter2&se=2030",
    "https://host/x?access_token=hunter2",
    "https://host/x?AWSAccessKeyId=hunter2",
]
PLAIN = [
    "s3://bucket/data",
    "sftp://me@host/data",
    "http://host:8080/path@2",
    "ray://host:10001/path@2",
    "s3://bucket/a:1234/b@2",
    "https://host/x?page=2&monkeys=3",
    "host: a /path with user:name@",
    "C:/x:y@z",
    "",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_secret_in_an_address_is_masked_and_refused(address: str) -> None:
    text = f'{{"data": "{address}", "name": "kept"}} and {address}: gone'
    assert has_secret(address)
    assert "hunter2" not in masked(text)
    assert masked(text).endswith(": gone")
    assert '"name": "kept"' in masked(text)
    assert masked(masked(text)) == masked(text)
    assert not has_secret(masked(address))
    for error in (UserError, StoreAway):
        assert "hunter2" not in str(error(text))
    with pytest.raises(UserError, match=r"^--data: .* is never stored; leave it out") as refused:
        refuse_secret(address, "--data")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("text", PLAIN)
def test_other_addresses_stay_as_they_are(text: str) -> None:
    assert masked(text) == text
    refuse_secret(text, "--data")


def test_control_characters_are_shown_as_escapes() -> None:
    assert printable("\x1b[2J\x07\x00\r\x7f\x9b1m") == "\\x1b[2J\\x07\\x00\\x0d\\x7f\\x9b1m"
    assert printable("a\tb\nc é 日本") == "a\tb\nc é 日本"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\xe9"
    assert printable("\ud800") == "\\ud800"
    assert shown("\x1b s3://a:b@c") == "\\x1b s3://***@c"
