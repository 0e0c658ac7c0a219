"""Reading what torch.save writes: real files of torch (tests/fixtures, see tools/make_fixtures.py) and hostile ones."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch_files import Stored, stored, torch_legacy, torch_zip, zip_bytes

from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.layouts import read_tree
from npllama.checkpoints.pytorch.opcodes import Opaque
from npllama.checkpoints.tensors import MAX_READ_BYTES, Tensor, View
from npllama.errors import CheckpointError
from npllama.numbers import widen
from npllama.numbers.bf16 import BF16

FIXTURES = Path(__file__).resolve().parent / "fixtures"
BASE = (np.arange(24, dtype=np.float32) / 4 - 3).reshape(4, 6)


POOL = Pool()


@pytest.fixture(autouse=True)
def _close_files() -> Iterator[None]:
    yield
    POOL.close()


def read(path: Path) -> object:
    return read_tree(InputFile(path, POOL))


def values(view: object) -> np.ndarray:
    """All elements of a view, as float32 or float64."""
    assert isinstance(view, View)
    rows = Tensor("x", view.shape, (view,)).rows(0, view.shape[0])
    return widen(BF16(rows)) if view.dtype == "bf16" else rows


def item(tree: object, *path: str) -> object:
    for key in path:
        assert isinstance(tree, dict)
        tree = tree[key]
    return tree


@pytest.fixture(params=["tree_zip.pt", "tree_legacy.pt"])
def tree(request: pytest.FixtureRequest) -> object:
    return read(FIXTURES / request.param)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
def test_numbers_of_every_float_format_are_those_that_torch_saved(tree: object, dtype: str) -> None:
    view = item(tree, dtype)
    assert isinstance(view, View)
    assert view.dtype == dtype
    np.testing.assert_array_equal(values(view), BASE)


def test_views_share_a_storage_and_keep_their_strides(tree: object) -> None:
    expected = {"transposed": BASE.T, "every_other": BASE[:, ::2], "tail": BASE[2:], "column": BASE[:, 4]}
    for name, wanted in expected.items():
        view = item(tree, "nested", "deeper", name)
        assert isinstance(view, View)
        np.testing.assert_array_equal(values(view), wanted, err_msg=name)
        assert view.storage is item(tree, "f32").storage


@pytest.mark.parametrize(("name", "row"), [("parameter", 1), ("tagged", 0), ("marked", 2)])
def test_parameters_and_tensors_with_attributes_are_their_numbers(tree: object, name: str, row: int) -> None:
    np.testing.assert_array_equal(values(item(tree, name)), BASE[row])


def test_state_dicts_are_dicts_of_tensors(tree: object) -> None:
    for name in ("state", "module_state"):
        np.testing.assert_array_equal(values(item(tree, name, "weight")), BASE[:2, :3])


def test_small_expanded_scalar_and_empty_tensors_are_read(tree: object) -> None:
    np.testing.assert_array_equal(values(item(tree, "expanded")), np.full(7, 0.5))
    np.testing.assert_array_equal(values(item(tree, "empty")), np.zeros((0, 3)))
    scalar = item(tree, "scalar")
    assert isinstance(scalar, View)
    assert scalar.shape == ()


def test_plain_values_are_themselves_and_torch_words_are_inert(tree: object) -> None:
    text = [1, 2.5, None, True, False, -7, 300, 70000, 2**40, "text", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    assert item(tree, "plain") == text
    assert item(tree, "shape") == (4, 6)
    assert isinstance(item(tree, "device"), Opaque)


def test_two_names_for_one_storage_are_equal_views() -> None:
    tied = read(FIXTURES / "tied_zip.pt")
    assert item(tied, "tok_embeddings.weight") == item(tied, "output.weight")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("module_zip.pt", r"names 'torch\.nn\.modules\.linear\.Linear'.*save only the state_dict"),
        ("protocol4_zip.pt", "pickle protocol 4, but 2 is needed"),
        ("conjugate_zip.pt", "stored negated or conjugated"),
        ("torchscript.pt", "is a TorchScript program"),
    ],
)
def test_other_things_that_torch_writes_are_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{name}.*{reason}"):
        read(FIXTURES / name)


def test_every_fixture_agrees_with_torch_itself() -> None:
    torch = pytest.importorskip("torch", reason="compares with torch.load, which needs torch")
    for name in ("tree_zip.pt", "tree_legacy.pt"):
        theirs = torch.load(FIXTURES / name, weights_only=True)
        ours = read(FIXTURES / name)
        for key in ("f32", "f16", "bf16", "f64", "parameter", "expanded"):
            np.testing.assert_array_equal(values(item(ours, key)), theirs[key].detach().double().numpy(), err_msg=key)


# Layout of bytes ------------------------------------------------------------------------------------------------------


def put(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("save", [torch_zip, torch_legacy])
def test_blocks_of_rows_are_those_of_the_whole_for_every_stride(tmp_path: Path, save: object) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(60, 70)).astype(np.float32)
    data, n = base.tobytes(), 4200
    views = {
        "transposed": (Stored(data, "f32", (70, 60), 0, (1, 70), "0"), base.T),
        "narrow": (Stored(data, "f32", (60, 3), 5, (70, 1), "0"), base[:, 5:8]),
        "wide": (Stored(data, "f32", (20, 10), 71, (210, 7), "0"), base.reshape(-1)[71:].take(
            210 * np.arange(20)[:, None] + 7 * np.arange(10), mode="clip")),
        "column": (Stored(data, "f32", (60,), 3, (70,), "0"), base[:, 3]),
        "overlapping": (Stored(data, "f32", (50, 20), 0, (2, 1), "0"), base.reshape(-1)[
            2 * np.arange(50)[:, None] + np.arange(20)]),
    }  # fmt: skip
    assert n == base.size
    tree = read(put(tmp_path, save({name: view for name, (view, _) in views.items()})))
    for name, (_, wanted) in views.items():
        view = item(tree, name)
        assert isinstance(view, View)
        tensor = Tensor(name, view.shape, (view,))
        for start, stop in [(0, len(wanted)), (0, 1), (7, 18), (len(wanted) - 1, len(wanted)), (4, 4)]:
            rows = tensor.rows(start, stop)
            assert rows.flags.c_contiguous
            np.testing.assert_array_equal(rows, wanted[start:stop], err_msg=name)


def test_a_large_transposed_tensor_is_read_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = np.arange(1500 * 1600, dtype=np.float32).reshape(1500, 1600)
    tree = read(put(tmp_path, torch_zip({"x": Stored(base.tobytes(), "f32", (1600, 1500), 0, (1, 1600))})))
    sizes: list[int] = []
    plain = InputFile.read_into
    monkeypatch.setattr(InputFile, "read_into", lambda f, o, t: (sizes.append(memoryview(t).nbytes), plain(f, o, t)))
    view = item(tree, "x")
    assert isinstance(view, View)
    np.testing.assert_array_equal(Tensor("x", view.shape, (view,)).rows(3, 9), base.T[3:9])
    assert max(sizes) <= MAX_READ_BYTES
    assert sum(sizes) <= 1500 * 6 * 4


def test_big_endian_storages_are_turned_to_the_native_order(tmp_path: Path) -> None:
    data = BASE.astype(">f4").tobytes()
    tree = read(put(tmp_path, torch_zip({"x": Stored(data, "f32", (4, 6))}, extra={"byteorder": b"big"})))
    np.testing.assert_array_equal(values(item(tree, "x")), BASE)


def test_an_archive_of_early_torch_without_byteorder_and_zip64_is_read(tmp_path: Path) -> None:
    whole: list[tuple[bytes, bytes]] = []
    torch_zip({"x": stored(BASE)}, edit=lambda e: whole.extend((f"r/{k}".encode(), v) for k, v in e.items()))
    entries = [(name, data) for name, data in whole if name != b"r/byteorder"]
    np.testing.assert_array_equal(values(item(read(put(tmp_path, zip_bytes(entries, zip64=False))), "x")), BASE)


def test_entries_beyond_four_gigabytes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    write_sparse_zip64(path)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("files with holes: this file system has none")
    view = item(read(path), "x")
    assert isinstance(view, View)
    np.testing.assert_array_equal(values(view), [1.5, -2.0])
    assert view.storage.start > 1 << 32


def write_sparse_zip64(path: Path) -> None:
    """Two storages, the first of 4 GiB of holes, with sizes and offsets in the zip64 fields."""
    large = 1 << 32
    whole: dict[str, bytes] = {}
    torch_zip({"x": stored(np.array([1.5, -2.0])), "y": stored(np.zeros(1), key="1")}, edit=whole.update)
    names = [*whole]
    central = b""
    with open(path, "wb") as file:
        for name in names:
            raw, data, header = f"a/{name}".encode(), whole[name], file.tell()
            size = len(data) if name != "hole" else large
            file.write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0x0808, 0, 0, 0, 0, 0, 0, len(raw), 0) + raw + data)
            if name == "byteorder":  # holes between two entries push all later ones beyond 4 GiB
                file.seek(large, os.SEEK_CUR)
            extra = struct.pack("<HHIHHQQQ", 0x5455, 4, 0, 1, 24, size, size, header)  # a time stamp comes first
            full = 0xFFFFFFFF
            fields = (0x02014B50, 0, 0, 0x0808, 0, 0, 0, 0, full, full, len(raw), len(extra), 0, 0, 0, 0, full)
            central += struct.pack("<IHHHHHHIIIHHHHHII", *fields) + raw + extra
        offset, n = file.tell(), len(names)
        file.write(central + struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0, 45, 0, 0, n, n, len(central), offset))
        file.write(struct.pack("<IIQI", 0x07064B50, 0, offset + len(central), 1))
        file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n, n, 0xFFFFFFFF, 0xFFFFFFFF, 0))


# Hostile archives -----------------------------------------------------------------------------------------------------

ONE = {"x": stored(BASE)}


def refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        values(item(read(put(tmp_path, data)), "x"))
    assert str(caught.value).startswith("file.pt")
    assert "\n" not in str(caught.value)


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    entries: list[tuple[bytes, bytes]] = []
    torch_zip(ONE, edit=lambda e: entries.extend((f"r/{k}".encode(), v) for k, v in e.items()))
    refused(tmp_path, zip_bytes(entries, method=8), "is compressed, but torch.save never does that")


def test_a_storage_shorter_or_longer_than_announced_is_refused(tmp_path: Path) -> None:
    for size in (92, 100):
        refused(
            tmp_path, torch_zip(ONE, extra={"data/0": bytes(size)}), f"storage '0' has {size} bytes, but 24 elements"
        )


def test_a_missing_storage_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, torch_zip(ONE, edit=lambda e: e.pop("data/0")), "has no entry 'data/0'")


def test_an_entry_that_stands_twice_is_refused(tmp_path: Path) -> None:
    entries: list[tuple[bytes, bytes]] = []
    torch_zip(ONE, edit=lambda e: entries.extend((f"r/{k}".encode(), v) for k, v in e.items()))
    refused(tmp_path, zip_bytes([*entries, entries[2]]), "entry 'data/0' stands twice")


def test_entries_outside_the_first_folder_are_refused(tmp_path: Path) -> None:
    entries: list[tuple[bytes, bytes]] = []
    torch_zip(ONE, edit=lambda e: entries.extend((f"r/{k}".encode(), v) for k, v in e.items()))
    refused(tmp_path, zip_bytes([*entries, (b"other/data.pkl", b"")]), "zip archive of another kind")


def test_bytes_before_between_and_after_the_directory_are_refused(tmp_path: Path) -> None:
    whole = torch_zip(ONE)
    refused(tmp_path, whole + b"\0", "directory at its end is missing")
    refused(tmp_path, whole[:64] + whole, "impossible place|overlap|contradicts")
    refused(tmp_path, whole[:-1], "directory at its end is missing")


def test_a_local_header_that_contradicts_the_directory_is_refused(tmp_path: Path) -> None:
    whole = torch_zip(ONE)
    refused(tmp_path, whole.replace(b"archive/data/0", b"archive/data/7", 1), "'data/0' contradicts the directory")


@pytest.mark.parametrize(("name", "what"), [("constants.pkl", "TorchScript"), ("archive_format", "exported program")])
def test_programs_are_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    refused(tmp_path, torch_zip(ONE, extra={name: b"x"}), what)


def test_unknown_versions_and_byte_orders_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, torch_zip(ONE, extra={"version": b"11\n"}), r"format version '11\\n', but 1 to 10 are known")
    refused(tmp_path, torch_zip(ONE, extra={"byteorder": b"middle"}), "byte order .* little or big")
    refused(tmp_path, zip_bytes([(b"a/arr_0.npy", b"x")]), "zip archive without data.pkl")


def patched(data: bytes, entry: int, field: int, layout: str, value: int) -> bytes:
    """The archive with one number of its central directory changed; `field` is its place in the entry's header."""
    at = 0
    for _ in range(entry + 1):
        at = data.index(b"PK\1\2", at + 1)
    return data[: at + field] + struct.pack(layout, value) + data[at + field + struct.calcsize(layout) :]


@pytest.mark.parametrize(
    ("entry", "field", "layout", "value", "reason"),
    [
        (1, 42, "<I", 0, "its entries overlap"),
        (0, 42, "<I", 1, "its entries overlap"),
        (1, 8, "<H", 0x0809, "an entry of its directory is impossible"),
        (1, 34, "<H", 1, "an entry of its directory is impossible"),
        (3, 32, "<H", 9999, "an entry of its directory is impossible"),
        (2, 20, "<I", 1, "an entry has two sizes"),
        (2, 24, "<I", 0xFFFFFFFF, "a large entry has no 64-bit size"),
    ],
)
def test_a_directory_with_an_impossible_entry_is_refused(
    tmp_path: Path, entry: int, field: int, layout: str, value: int, reason: str
) -> None:
    refused(tmp_path, patched(torch_zip(ONE), entry, field, layout, value), reason)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (10, 5, "its directory ends in the middle"),
        (10, 3, "its directory has bytes left over"),
        (10, 0, "impossible place or size"),
        (10, 9, "impossible place or size"),
        (16, 0, "impossible place or size"),
        (20, 1, "the directory at its end is missing"),
    ],
)
def test_a_directory_of_another_length_is_refused(tmp_path: Path, field: int, value: int, reason: str) -> None:
    entries: list[tuple[bytes, bytes]] = []
    torch_zip(ONE, edit=lambda e: entries.extend((f"{'r' * 20}/{k}".encode(), v) for k, v in e.items()))
    data = bytearray(zip_bytes(entries, zip64=False))
    struct.pack_into("<H", data, len(data) - 22 + field, value)
    refused(tmp_path, bytes(data), reason)


def test_two_directories_at_the_end_must_agree(tmp_path: Path) -> None:
    data = bytearray(torch_zip(ONE))
    struct.pack_into("<H", data, len(data) - 22 + 10, 3)
    refused(tmp_path, bytes(data), "the zip64 directory at its end contradicts the other one")


def test_an_archive_of_a_few_bytes_or_a_tree_of_a_megabyte_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, b"PK\3\4 and so on", "it ends in the middle")
    refused(
        tmp_path, torch_zip(ONE, extra={"data.pkl": bytes(1 << 20)}), "1,048,576 bytes, but at most 524,288 are read"
    )


# Hostile trees --------------------------------------------------------------------------------------------------------


def with_pickle(code: bytes) -> bytes:
    return torch_zip(ONE, extra={"data.pkl": code})


def test_no_name_but_torchs_own_is_accepted_in_any_opcode(tmp_path: Path) -> None:
    call = b"X\x04\0\0\0echo\x85R."
    refused(tmp_path, with_pickle(b"\x80\x02cos\nsystem\n" + call), "names 'os.system', which is no part")
    refused(tmp_path, with_pickle(b"\x80\x02cbuiltins\neval\n" + call), "names 'builtins.eval'")
    refused(tmp_path, with_pickle(b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93" + call), "opcode 0x93")
    refused(tmp_path, with_pickle(b"\x80\x02(X\x04\0\0\0echoios\nsystem\n."), "opcode 0x69")
    refused(tmp_path, with_pickle(b"\x80\x02(cos\nsystem\no."), "names 'os.system'")
    refused(tmp_path, with_pickle(b"\x80\x02\x82\x01."), "opcode 0x82")
    refused(tmp_path, with_pickle(b"\x80\x02X\x09\0\0\0os.system" + call), "called that is no function")
    refused(tmp_path, with_pickle(b"\x80\x02ctorch\nFloatStorage\n)\x81."), "opcode 0x81")
    refused(tmp_path, with_pickle(b"\x80\x02ctorch\nFloatStorage\n)R."), "called that is no function")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (b"r\xff\xff\xff\x7f.", "nothing is there to remember"),
        (b"Nr\xff\xff\xff\x7f0.", "opcode 0x30"),
        (b"X\xff\xff\xff\x7f.", "2,147,483,647 bytes are announced where 1 are left"),
        (b"X\x01\0\0\0\xff.", "a text is not UTF-8"),
        (b"\x8e" + b"\xff" * 8, "opcode 0x8e"),
        (b"\x8b\xff\xff\xff\x7f", "opcode 0x8b"),
        (b"\x8a\xff" + b"\x01" * 255 + b".", "a whole number has 255 bytes"),
        (b"h\x05.", "recalled that was never remembered"),
        (b"t.", "a group ends that never began"),
        (b"a.", "a value is used that was never made"),
        (b"\x87.", "a value is used that was never made"),
        (b"NNa.", "added to what is no list"),
        (b")NNs.", "added to what is no dict"),
        (b"}(Nu.", "a key has no value"),
        (b"}NNs.", "a key of a dict is a NoneType"),
        (b"}]Ns.", "a key of a dict is a list"),
        (b"}J\xff\xff\xff\xffNs.", "a key of a dict is a int"),
        (b"}K\x01NsK\x01Ns.", "'1' stands twice in one dict"),
        (b"NNb.", "attributes are given to what takes none"),
        (b"NN.", "values are left over"),
        (b"(N.", "values are left over"),
        (b"N", "it ends in the middle"),
        (b"cabc", "a name has no end"),
        (b"NQ.", "a persistent id is no storage"),
        (b"X\x06\0\0\0module\x85Q.", "a pickled module"),
    ],
)
def test_impossible_programs_are_refused(tmp_path: Path, code: bytes, reason: str) -> None:
    refused(tmp_path, with_pickle(b"\x80\x02" + code), reason)


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x18tQ"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (STORAGE.replace(b"ctorch\nFloatStorage\n", b"N"), "a storage is not described as torch does it"),
        (STORAGE.replace(b"Float", b"Funny"), "names 'torch.FunnyStorage'"),
        (STORAGE.replace(b"K\x18", b"J\xff\xff\xff\xff"), "storage '0' has an impossible size"),
        (STORAGE.replace(b"K\x18", b"\x88"), "a storage is not described as torch does it"),
        (STORAGE.replace(b"storage", b"forages"), "a persistent id is no storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "a tensor is not described as torch does it"),
        (b"ctorch._utils\n_rebuild_tensor\n)R", "a tensor is not described as torch does it"),
        (b"ctorch._utils\n_rebuild_parameter\nNNN\x87R", "a parameter is no tensor"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\nN\x85R", "a tensor is not described as torch does it"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nSize\nN)}tR", "a tensor is of a class of its own"),
        (b"ccollections\nOrderedDict\nN\x85R", "an OrderedDict has arguments"),
        (b"ctorch\nSize\nN\x85R", "a shape is no tuple"),
    ],
)
def test_descriptions_that_torch_does_not_write_are_refused(tmp_path: Path, code: bytes, reason: str) -> None:
    refused(tmp_path, with_pickle(b"\x80\x02" + code + b"."), reason)


def test_the_tensors_of_the_first_torch_are_read(tmp_path: Path) -> None:
    old = b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\0K\x04K\x06\x86K\x06K\x01\x86tR"
    code = b"\x80\x02}X\1\0\0\0x" + old + b"s."
    data = torch_zip({}, extra={"data.pkl": code, "data/0": BASE.tobytes()})
    np.testing.assert_array_equal(values(item(read(put(tmp_path, data)), "x")), BASE)


def test_tensors_of_other_types_are_words_for_messages() -> None:
    float8 = read(FIXTURES / "float8_zip.pt")
    assert isinstance(float8, Opaque)
    assert float8.what == "a tensor of type torch.float8_e4m3fn"


def test_nesting_without_end_is_harmless(tmp_path: Path) -> None:
    deep = b"\x80\x02X\x01\0\0\0x" + b"\x85" * 500_000 + b"."
    assert type(read(put(tmp_path, with_pickle(deep)))) is tuple  # made, and given up again, without recursion


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "reason"),
    [
        (1, (4, 6), (6, 1), "reaches element 24 of a storage of 24"),
        (0, (4, 7), (6, 1), "reaches element 24 of a storage of 24"),
        (0, (4, 6), (7, 1), "reaches element 26 of a storage of 24"),
        (-1, (4, 6), (6, 1), "impossible shape"),
        (0, (4, 6), (6, -1), "impossible shape"),
        (0, (4, -6), (6, 1), "impossible shape"),
        (0, (1 << 70, 1), (0, 1), "impossible shape"),
        (0, (4, 6), (1,), "not described as torch does it"),
        (0, (True, 6), (6, 1), "impossible shape"),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], reason: str
) -> None:
    refused(tmp_path, torch_zip({"x": Stored(BASE.tobytes(), "f32", shape, offset, strides)}), reason)


def test_a_number_repeated_without_end_cannot_be_a_weight(tmp_path: Path) -> None:
    huge = Stored(BASE.tobytes(), "f32", (1 << 20, 1 << 20), 0, (0, 0))
    view = item(read(put(tmp_path, torch_zip({"x": huge}))), "x")
    assert isinstance(view, View)
    with pytest.raises(CheckpointError, match="1,099,511,627,776 elements, but only 24 are stored"):
        view.check_weight("x")


def test_one_storage_described_in_two_ways_is_refused(tmp_path: Path) -> None:
    data = bytes(16)
    both = {"x": Stored(data, "f16", (8,), key="0"), "y": Stored(data, "bf16", (8,), key="0")}
    refused(tmp_path, torch_zip(both), "described in two ways")


# The legacy format ----------------------------------------------------------------------------------------------------


def test_a_legacy_file_ends_where_its_storages_end(tmp_path: Path) -> None:
    whole = torch_legacy(ONE)
    refused(tmp_path, whole + b"\0", "but its storages end at")
    refused(tmp_path, whole[:-1], "but its storages end at")
    refused(tmp_path, whole[: -24 * 4 - 3], "points to bytes")


def test_a_legacy_storage_has_one_size_and_its_name_in_the_list(tmp_path: Path) -> None:
    whole = torch_legacy(ONE)
    refused(tmp_path, whole[: -96 - 8] + struct.pack("<q", 25) + whole[-96:], "storage '0' has two sizes")
    listed = b"](X\x01\0\0\x000e."
    assert listed in whole
    refused(tmp_path, whole.replace(listed, b"](X\x01\0\0\x001e."), "not those that its tensors name")
    refused(tmp_path, whole.replace(listed, b"N" + b"."), "not those that its tensors name")


def test_another_legacy_protocol_or_no_byte_order_is_refused(tmp_path: Path) -> None:
    whole = torch_legacy(ONE)
    other = (1001).to_bytes(10, "little")
    refused(tmp_path, whole.replace(other, (1002).to_bytes(10, "little"), 1), "legacy format of protocol 1001")
    refused(tmp_path, whole.replace(b"little_endian", b"little_endiam"), "its byte order is missing")


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git-LFS pointer.*git lfs pull"),
        (b"GGUF\3\0\0\0", "is a file of gguf, but its name says PyTorch or safetensors"),
        (b"tjgg\3\0\0\0", "is a GGJT file of llama.cpp"),
        (b"24ka\1\0\0\0", r"is a file of llama2\.c, but its name says PyTorch or safetensors"),
        (b"\x93NUMPY\1\0", "is a NumPy array"),
        (b"\x1f\x8b\x08\0", "is compressed with gzip"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"PK\5\6" + bytes(18), "is an empty zip archive"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "is a tar file"),
        (b"\x80\x02}q\0.", "is a plain pickle"),
        (b"\1\2hello, world", r"begins with '\\x01\\x02hello,', which is no format"),
        (b"Access to this model is restricted.\nLog in.", "is a text that begins with 'Access to this model is restr"),
        (b"\xef\xbb\xbf \r\n<!DocType HTML>", "is a web page"),
        ("\ufeff<HTML>".encode("utf-16-le"), "is a web page"),
        (b"<?xml version='1.0'?><Error/>", "is a web page"),
        (b"# xet version 0\n", "is a Xet pointer"),
        (
            struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512) + bytes(64),
            r"is a file of llama2\.c, but its name says PyTorch",
        ),
        (struct.pack("<7i", 288, 768, 6, 6, 6, -32000, 256), r"is a file of llama2\.c, but its name says PyTorch"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, head: bytes, what: str) -> None:
    refused(tmp_path, head, what)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("named pipes: this system has none")
    os.mkfifo(tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file\.pt is not a regular file"):
        read(tmp_path / "file.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^nothing\.pt cannot be read: No such file"):
        read(tmp_path / "nothing.pt")


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = put(tmp_path, torch_zip(ONE))
    view = item(read(path), "x")
    os.truncate(path, 200)
    with pytest.raises(CheckpointError, match=r"file\.pt was changed while it was read"):
        values(view)


def test_a_file_that_shrinks_between_two_looks_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npllama.checkpoints.files._identity", lambda file: (1, 300, 1))
    file = InputFile(put(tmp_path, bytes(300)), POOL)
    os.truncate(tmp_path / "file.pt", 200)
    with pytest.raises(CheckpointError, match=r"file\.pt became shorter while it was read"):
        file.read(100, 200)


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    pool = Pool()
    files = []
    for i in range(30):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 8)
        files.append(InputFile(tmp_path / f"{i}", pool))
    assert [file.read(0, 1)[0] for file in files] == list(range(30))
    assert len(pool) <= 8
    pool.close()
    assert len(pool) == 0
