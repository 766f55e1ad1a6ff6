"""kvm.monitor.disks: what clients are told of a disk (qmp.md §14)."""

import pytest

from kvm.block import RawImage
from kvm.config import DiskConfig
from kvm.monitor.disks import describe, describe_node


@pytest.fixture
def image(directory):
    path = directory / "disk.img"
    path.write_bytes(bytes(4096))
    with RawImage(str(path)) as image:
        yield image


def only(image, name, device, **options):
    arguments = {"drives": [], "nodes": [], **options}
    (disk,) = describe([DiskConfig(name, image, 0)], devices=[device], **arguments)
    return disk


def test_a_drive_has_a_device_name_and_a_node_of_our_own(image):
    disk = only(
        image,
        "d0",
        "virtio-blk-device,drive=d0,id=disk",
        drives=[f"if=none,id=d0,file={image.path},format=raw,cache=unsafe"],
    )
    assert (disk.drive, disk.node, disk.device, disk.path) == ("d0", "#block000", "disk", "/machine/peripheral/disk")
    assert describe_node(disk, True)["cache"] == {"writeback": True, "direct": False, "no-flush": True}


def test_a_node_keeps_its_name_and_has_no_device_name(image):
    options = f"driver=file,node-name=n0,filename={image.path},cache.direct=on"
    disk = only(image, "n0", '{"driver": "virtio-blk-device", "drive": "n0"}', nodes=[options])
    assert (disk.drive, disk.node, disk.driver) == ("", "n0", "file")
    assert disk.device == disk.path == "/machine/peripheral-anon/device[0]"
    assert describe_node(disk, True)["cache"]["direct"] is True


def test_a_node_says_what_its_image_is_and_whether_it_is_ours(image):
    disk = only(image, "d0", "virtio-blk-device,drive=d0", drives=[f"if=none,id=d0,file={image.path},format=raw"])
    node = describe_node(disk, False)
    assert node["image"]["virtual-size"] == 4096
    assert node["image"]["filename"] == node["file"] == image.path
    assert node["active"] is False


def test_a_file_that_has_gone_has_no_actual_size(image, directory):
    disk = only(image, "d0", "virtio-blk-device,drive=d0", drives=[f"if=none,id=d0,file={image.path},format=raw"])
    assert "actual-size" in describe_node(disk, True)["image"]
    (directory / "disk.img").unlink()
    assert "actual-size" not in describe_node(disk, True)["image"]
