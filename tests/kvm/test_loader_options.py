"""kvm.loader_options: bytes in memory and where a vCPU begins, and what is said about mistakes (cli.md §3)."""

import pytest

from kvm.config import Blob, MachineConfig
from kvm.keyval import UsageError
from kvm.loader_options import add_loader, is_loader
from tests.support.elf import elf_file


@pytest.fixture
def image(directory):
    path = directory / "image"
    path.write_bytes(b"hello")
    return path


def loaded(text):
    config = MachineConfig(cpus=2)
    add_loader(text, config)
    return config.blobs, config.entry_points


def test_a_loader_is_known_in_both_forms():
    assert is_loader("loader,addr=5,cpu-num=0") and is_loader('{"driver": "loader"}')
    assert not is_loader("virtio-blk-device,drive=loader")


def test_a_file_goes_to_its_address(image):
    assert loaded(f"loader,file={image},addr=0x1000") == ([Blob(0x1000, b"hello")], {})
    assert loaded(f"loader,file={image},addr=1M,force-raw=on,cpu-num=1") == ([Blob(1 << 20, b"hello")], {1: 1 << 20})


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("data=0x1234,data-len=4", b"\x34\x12\0\0"),
        ("data=0x1234,data-len=4,data-be=on", b"\0\0\x12\x34"),
        ("data=0x1234,data-len=1", b"\x34"),
    ],
)
def test_a_number_goes_to_its_address(words, data):
    assert loaded(f"loader,addr=0x10,{words}") == ([Blob(0x10, data)], {})


def test_a_vcpu_begins_where_it_is_told():
    assert loaded("loader,addr=0x7c00,cpu-num=0") == ([], {0: 0x7C00})


@pytest.mark.parametrize(
    ("words", "desc"),
    [
        ("", "please include valid arguments"),
        (",addr=0", "please include valid arguments"),
        (",cpu-num=0", "please include valid arguments"),
        (",foo=1", "Property 'loader.foo' not found"),
        (",addr=0,data=5", "Both data and data-len must be specified"),
        (",addr=0,data-len=4", "Both data and data-len must be specified"),
        (",addr=0,data=5,data-len=9", "data-len cannot be greater then 8 bytes"),
        (",file=x,data=5", "Specifying a file is not supported when loading memory values"),
        (",addr=0,data=5,data-len=4,cpu-num=0", "Specifying a cpu-num is not supported when loading memory values"),
        (",addr=0,cpu-num=2", "Specified boot CPU#2 is nonexistent"),
        (",addr=0,file=/no/such", "Cannot load specified image /no/such: No such file or directory"),
    ],
)
def test_a_mistake_is_named(words, desc):
    with pytest.raises(UsageError) as caught:
        loaded(f"loader{words}")
    assert str(caught.value) == desc


def test_segments_go_where_the_elf_file_says_and_a_vcpu_begins_at_its_entry(image):
    image.write_bytes(elf_file([(0x40010000, 0x10000, b"one", 8), (0x40020000, 0x20000, b"two", 3)], entry=0x40010004))
    blobs = [Blob(0x10000, b"one\0\0\0\0\0"), Blob(0x20000, b"two")]
    assert loaded(f"loader,file={image},addr=0x5000") == (blobs, {})
    assert loaded(f"loader,file={image},cpu-num=1") == (blobs, {1: 0x10004})


def test_an_elf_file_is_bytes_when_that_is_wanted_or_when_it_is_not_whole(image):
    whole = elf_file([(0, 0x10000, b"one", 8)], entry=0)
    image.write_bytes(whole)
    assert loaded(f"loader,file={image},addr=0x1000,force-raw=on")[0] == [Blob(0x1000, whole)]
    image.write_bytes(whole[:-1])
    assert loaded(f"loader,file={image},addr=0x1000,cpu-num=0") == ([Blob(0x1000, whole[:-1])], {0: 0x1000})


def test_an_elf_file_that_no_memory_could_take_is_refused(image):
    image.write_bytes(elf_file([(0, 0x10000, b"one", 1 << 40)], entry=0))
    with pytest.raises(UsageError) as caught:
        loaded(f"loader,file={image}")
    text = "its ELF segments have 0x10000000000 bytes, at most 0x40000000 are loaded; force-raw=on loads it as it is"
    assert str(caught.value) == f"Cannot load specified image {image}: {text}"
