"""What a client sends becomes the files of the adapter, or is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from dvora.adapter_file.packs import write_pack
from dvora.adapter_file.uploads import Upload
from dvora.adapter_file.values import FolderSource
from dvora.adapter_file.values_file import SETTINGS, VALUES
from dvora.flat import Layout
from tests.peft.kinds import bits, mlp, saved


@pytest.mark.parametrize("groups", [1, 3])
def test_a_vector_a_file_and_a_pack_are_one_adapter(groups: int, tmp_path: Path) -> None:
    model = mlp(lambda_d_groups=groups).trained()
    folder, layout = saved(model, tmp_path / "a"), Layout.of(model)
    write_pack(tmp_path / "pack", {"a": folder})
    like, vector = FolderSource(folder).description, layout.to_vector(model)
    expected = load((folder / VALUES).read_bytes())
    sent = Upload(bits(vector).numpy().tobytes(), is_vector=True)
    for upload in (sent, Upload((folder / VALUES).read_bytes()), Upload((tmp_path / "pack").read_bytes())):
        files = upload.files(like)
        assert files[SETTINGS] == (folder / SETTINGS).read_bytes()
        found = load(files[VALUES])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_vector_of_another_size_is_refused(tmp_path: Path) -> None:
    model = mlp(lambda_d_groups=3).trained()
    like = FolderSource(saved(model, tmp_path / "a")).description
    vector = bits(Layout.of(model).to_vector(model)).numpy().tobytes()
    with pytest.raises(ValueError, match=r"a flat vector is float32 and has .* bytes here, got"):
        Upload(vector[:-4], is_vector=True).files(like)
