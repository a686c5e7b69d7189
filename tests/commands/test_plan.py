"""`segtrain plan`: its files agree with what it prints, and its exit status says whether anything fits."""

import json

import pytest

from tests.helpers.checkout import TINY

SMALL = ("experiment=toy", f"plugins=[{TINY}]", "model.backbone=tiny", "augmentation.crop_size=[64,96]")


@pytest.mark.slow
def test_the_command_writes_what_it_prints(segtrain, tmp_path):
    answer = segtrain(
        "plan", *SMALL, "plan.device_memory=12MiB", "plan.reserve=2MB", "plan.devices=2", f"output={tmp_path}"
    )
    assert answer.status == 0, answer
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["device_memory"] == 12 * 2**20 and found["reserve"] == 2 * 10**6
    assert "12.58 MB (12.00 MiB)" in answer.out and answer.out.splitlines()[-1] == str(tmp_path / "plan.json")
    most = found["max_batch"]
    assert most["inplace_abn+8bit"] > most["inplace_abn"] > most["batch_norm"] > 0
    assert most["inplace_abn_sync"] == most["inplace_abn"] and most.keys() == found["max_crop"].keys()
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert found["validation"]["ways"] and found["precision"].keys() == {"bf16"}


@pytest.mark.slow
def test_nothing_fits_is_status_1_and_units_are_checked(segtrain, tmp_path):
    words = ("plan", *SMALL, f"output={tmp_path}")
    answer = segtrain(*words, "plan.device_memory=1.1MB", "plan.reserve=1MB")
    assert answer.status == 1 and "nothing fits 1.10 MB" in answer.err
    answer = segtrain(*words, "plan.device_memory=12gb")
    assert answer.status == 2 and "must be a number with a unit, GB, GiB, MB, MiB" in answer.err
    answer = segtrain(*words, "plan.device_memory=1GB")
    assert answer.status == 2 and "plan.reserve=1.2GB leaves nothing" in answer.err
