"""Tables and arrays of a user: joins, categories, labels, splits, and what is refused with its repair."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from mmc_fast.errors import InputError
from mmc_fast.experiments.data import MultimodalDataset, load
from mmc_fast.experiments.training import LoadedRun, TrainConfig, load_run, train

ROWS = 160


def tables(seed: int = 0, rows: int = ROWS) -> dict[str, pandas.DataFrame]:
    """Laboratory values of all but ten patients, demographics with a text column, labels and parts in a third table."""
    g = np.random.default_rng(seed)
    y = np.arange(rows) % 2
    ids = np.arange(rows) + 7
    labs = pandas.DataFrame({"patient": ids, "na": 140 + 5 * y + g.normal(size=rows), "k": g.normal(size=rows)})
    labs.loc[3::9, "k"] = np.nan
    words = np.array(["home", "ward", "clinic"])[g.integers(0, 3, rows)].astype(object)
    words[5], words[6::8] = "helicopter", "ship"  # a rare one, and one of test rows alone: both are "other"
    demo = pandas.DataFrame(
        {"patient": ids, "age": g.integers(20, 90, rows), "from": words, "smokes": g.random(rows) < 0.5}
    )
    out = pandas.DataFrame({"patient": ids, "died": np.array(["no", "yes"])[y]})
    out["part"] = np.array(["train", "train", "validation", "test"])[np.arange(rows) // 2 % 4]
    return {"labs": labs.iloc[10:], "demo": demo, "out": out}


ROLES: dict[str, Any] = {"label": "died", "id": "patient", "split": "part"}


def whole(rows: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    return rows["demo"].merge(rows["labs"], on="patient", how="left").merge(rows["out"], on="patient")


MAP = """
label = "died"
id = "patient"
split = "part"
[modalities]
labs = ["na", "k"]
demo = ["age", "from", "smokes"]
"""


def write(frame: pandas.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".feather":
        frame.reset_index(drop=True).to_feather(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def test_tables_joined_by_id_hold_what_was_computed_by_hand():
    t = tables()
    found = MultimodalDataset.from_frames(t, **ROLES)
    assert found.classes == ["no", "yes"]
    assert found.row_names == [str(n + 7) for n in range(ROWS)]
    assert found.labels.tolist() == [i % 2 for i in range(ROWS)]
    assert found.present[:, 0].tolist() == [False] * 10 + [True] * (ROWS - 10)  # the ten without laboratory values
    train_rows = t["out"]["part"].to_numpy() == "train"
    age = t["demo"]["age"].to_numpy().astype(float)
    np.testing.assert_allclose(
        found.features["demo"][:, 0], (age - age[train_rows].mean()) / age[train_rows].std(), rtol=1e-4, atol=1e-5
    )
    assert found.feature_names["demo"] == ["age", "from=clinic", "from=home", "from=ward", "from=other", "smokes"]
    assert found.feature_names["labs"] == ["na", "k", "k measured"]
    assert torch.equal(found.features["labs"][10:, 2] == 1, torch.tensor(t["labs"]["k"].notna().tolist()))
    hot = t["demo"]["from"].to_numpy() == "ward"
    values = found.features["demo"][:, 3].numpy()
    np.testing.assert_allclose(values, (hot - hot[train_rows].mean()) / hot[train_rows].std(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".feather"])
def test_every_format_and_layout_gives_the_same_arrays(ending: str, tmp_path: Path):
    t = tables()
    wanted = MultimodalDataset.from_frames(t, **ROLES)
    (tmp_path / "several").mkdir()
    for name, frame in t.items():
        write(frame.sample(frac=1, random_state=1), tmp_path / "several" / f"{name}{ending}")
    (tmp_path / "several" / "columns.toml").write_text(MAP.partition("[")[0])
    path = write(whole(t).sample(frac=1, random_state=2), tmp_path / f"one{ending}")
    (tmp_path / "one.toml").write_text(MAP)
    for found in (load(tmp_path / "several"), load(str(path))):
        assert found.row_names == wanted.row_names
        assert torch.equal(found.labels, wanted.labels)
        for view in ("labs", "demo"):
            assert found.feature_names[view] == wanted.feature_names[view]
            torch.testing.assert_close(found.features[view], wanted.features[view], rtol=1e-5, atol=1e-5)


def test_a_label_in_two_tables_is_joined_and_must_agree():
    t = tables()
    wanted = MultimodalDataset.from_frames(t, **ROLES)
    labels = t["out"][["patient", "died"]]
    t["demo"] = t["demo"].merge(labels.iloc[::2], on="patient", how="left")  # each table has the labels of some
    t["out"] = t["out"].assign(died=labels["died"].where(labels.index % 2 == 1))
    found = MultimodalDataset.from_frames(t, **ROLES)
    assert torch.equal(found.labels, wanted.labels)
    assert found.feature_names == wanted.feature_names
    for row, other in (
        (4, "yes"),
        (5, "no"),
    ):  # the later table's word comes before and after the other in the alphabet
        wrong = {**t, "out": t["out"].assign(died=labels["died"]), "demo": t["demo"].assign(died=labels["died"])}
        wrong["demo"].loc[row, "died"] = other
        with pytest.raises(InputError, match=f"'died' is .* for id '{row + 7}' and .* in another table"):
            MultimodalDataset.from_frames(wrong, **ROLES)


def test_a_drawn_split_does_not_depend_on_the_order_of_the_rows():
    one = whole(tables()).drop(columns="part")
    roles = {"label": "died", "id": "patient", "split": 3, "modalities": {"labs": ["na", "k"], "demo": ["age"]}}
    first = MultimodalDataset.from_frames(one, **roles)
    second = MultimodalDataset.from_frames(one.sample(frac=1, random_state=5), **roles)
    assert torch.equal(first.split, second.split)
    assert torch.equal(first.features["labs"], second.features["labs"])


def test_groups_stay_in_one_part():
    one = whole(tables()).drop(columns="part").assign(family=lambda f: (f["patient"] - 7) // 4)
    found = MultimodalDataset.from_frames(
        one, label="died", id="patient", group="family", modalities={"labs": ["na"], "demo": ["age"]}
    )
    assert found.ids.unique_consecutive(return_counts=True)[1].tolist() == [4] * (ROWS // 4)
    for family in range(ROWS // 4):
        assert len(found.split[family * 4 : family * 4 + 4].unique()) == 1
    with pytest.raises(InputError, match=r"id\(s\) are in more than one part"):
        MultimodalDataset.from_frames(
            whole(tables()).assign(family=lambda f: (f["patient"] - 7) // 4), label="died", id="patient", split="part",
            group="family", modalities={"labs": ["na"], "demo": ["age"]},
        )  # fmt: skip


def test_rows_that_share_an_id_stay_in_the_part_that_the_seed_draws():
    x, y, ids = {"x": np.arange(120.0)[:, None]}, np.array(["u", "v"] * 60), [f"p{n // 4}" for n in range(120)]
    found = [MultimodalDataset.from_arrays(x, y, id=ids, split=seed).split.reshape(30, 4) for seed in (0, 1)]
    assert all(bool((split == split[:, :1]).all()) for split in found)
    assert not torch.equal(*found)
    usual = MultimodalDataset.from_arrays(x, y, id=ids)
    assert torch.equal(usual.split.reshape(30, 4), found[0])
    assert (usual.name, MultimodalDataset.from_arrays(x, y, name="mine").name) == ("arrays", "mine")


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("0", "1", "2"), ("Train", "val", "TEST"),
                                   ("train", "valid", "test"), (0, 1, 2)])  # fmt: skip
def test_every_spelling_of_a_part(names: tuple):
    split = [names[n] for n in np.arange(90) // 5 % 3]
    x, y = {"x": np.arange(90.0)[:, None]}, np.array(["u", "v"] * 45)
    one = pandas.DataFrame({"a": x["x"][:, 0], "y": y, "part": split})
    for found in (
        MultimodalDataset.from_arrays(x, y, split=split),
        MultimodalDataset.from_frames(one, label="y", split="part", modalities={"a": ["a"]}),
    ):
        assert found.split.tolist() == (np.arange(90) // 5 % 3).tolist()


@pytest.mark.parametrize(
    ("label", "more", "classes"),
    [
        (["b", "a", "b", "c"], {}, ["a", "b", "c"]),
        ([1, 2, 3, 2], {"kind": "classification"}, ["1", "2", "3"]),
        ([10.0, 9.0, 9.0, 10.0], {}, ["9", "10"]),
        ([True, False, False, True], {}, ["False", "True"]),
    ],
)
def test_labels_keep_their_names(label: list[Any], more: dict[str, Any], classes: list[str]):
    values = label * 30
    found = MultimodalDataset.from_arrays({"x": np.random.default_rng(0).normal(size=(120, 2))}, values, **more)
    assert found.classes == classes
    names = [str(int(v)) if isinstance(v, float) else str(v) for v in values]
    assert [found.classes[i] for i in found.labels.tolist()] == names


def test_one_hot_labels_are_understood_and_others_refused():
    hot = np.eye(3)[np.arange(90) % 3]
    x = {"x": np.random.default_rng(0).normal(size=(90, 2))}
    assert MultimodalDataset.from_arrays(x, hot).labels.tolist() == [i % 3 for i in range(90)]
    hot[4, 0] = 1
    with pytest.raises(InputError, match="row 4 of the label columns"):
        MultimodalDataset.from_arrays(x, hot)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.arange(90) % 3, ("0", "1", "2")),
        (np.arange(90) // 3, tuple(map(str, range(30)))),
        (np.arange(90) % 3 + 1, None),
        (np.arange(90) % 3 * 2, None),
        (np.array([-1, 1, 2])[np.arange(90) % 3], None),
        (np.arange(90) % 46, None),  # fewer than two rows each
        ((np.arange(90) % 3).astype(float), None),
    ],
)
def test_an_array_of_integers_from_zero_numbers_classes(labels, classes):
    x = {"x": np.random.default_rng(0).normal(size=(90, 2))}
    if classes is None:
        with pytest.raises(InputError, match="codes or amounts"):
            MultimodalDataset.from_arrays(x, labels)
    else:
        dataset = MultimodalDataset.from_arrays(x, labels)
        assert (dataset.classes, dataset.labels.tolist()) == (list(classes), labels.tolist())


def test_a_row_with_one_of_two_labels_is_no_row_without_labels():
    t = tables()
    t["out"] = t["out"].assign(u=1.0, v=0.0)
    t["out"].loc[::2, ["u", "v"]] = 0.0, 1.0
    roles = ROLES | {"label": ["u", "v"]}
    t["out"].loc[8, ["u", "v"]] = np.nan
    with pytest.warns(UserWarning, match="1 id\\(s\\) have no label and are left out, the first is '15'"):
        assert len(MultimodalDataset.from_frames(t, **roles)) == ROWS - 1
    t["out"].loc[9, "v"] = np.nan
    with pytest.warns(match="no label"), pytest.raises(InputError, match="label columns u, v"):
        MultimodalDataset.from_frames(t, **roles)


REFUSED: dict[str, tuple[Any, str]] = {
    "numbers and text": (
        lambda f: f.assign(na=f["na"].astype(object).where(f.index != 16, "<5")),
        "'na' holds numbers and '<5' in row 16",
    ),
    "decimal commas": (lambda f: f.assign(na=[f"{x:.2f}".replace(".", ",") for x in f["na"]]), "not commas"),
    "dates": (lambda f: f.assign(na=pandas.Timestamp("2020-01-01")), "'na' holds dates"),
    "names": (lambda f: f.assign(na=[f"n{i}" for i in range(len(f))]), "none of them often enough"),
    "no label": (lambda f: f.assign(died=f["died"].where(f.index != 3)), "label 'died' is empty in row 3"),
    "whole numbers": (lambda f: f.assign(died=f.index % 5), 'say kind = "classification"'),
    "no such column": (lambda f: f.drop(columns="k"), "Unknown column of modality 'labs'"),
    "no such label": (
        lambda f: f.rename(columns={"died": "dead"}),
        "'died'. Did you mean 'dead'? Allowed: patient, age, from, smokes, na, k, dead, part",
    ),
    "split": (lambda f: f.assign(part="later"), "allowed are train, validation, test"),
    "no modalities": (None, "which columns belong to which modality?"),
    "no id": (lambda f: f.assign(patient=f["patient"].where(f.index != 2)), "'patient' is empty in row 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tables_are_refused_with_file_column_and_repair(case: str, tmp_path: Path):
    change, said = REFUSED[case]
    table = whole(tables())
    path = write(change(table) if change else table, tmp_path / f"one.{'parquet' if case == 'dates' else 'csv'}")
    (tmp_path / "one.toml").write_text(MAP if change else MAP.partition("[")[0])
    with pytest.raises(InputError) as error:
        load(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_folder_that_cannot_be_read_names_the_file(tmp_path: Path):
    t = tables()
    for name, frame in t.items():
        write(frame, tmp_path / f"{name}.csv")
    with pytest.raises(InputError, match=r"which columns are features and which is the label\? Write .*columns\.toml"):
        load(tmp_path)
    (tmp_path / "columns.toml").write_text(MAP.partition("[")[0])
    assert load(tmp_path).name == tmp_path.name
    assert (
        load(
            write(whole(t), tmp_path / "one.csv"), columns=ROLES | {"modalities": {"labs": ["na"], "demo": ["age"]}}
        ).name
        == "one"
    )
    (tmp_path / "one.csv").unlink()
    with pytest.raises(InputError, match="Unknown id column in table 'labs'"):
        MultimodalDataset.from_frames(t | {"labs": t["labs"].rename(columns={"patient": "who"})}, **ROLES)
    write(t["labs"].assign(k="2,5"), tmp_path / "labs.csv")
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path / 'labs.csv'))}.*'k'"):
        load(tmp_path)
    write(t["labs"], tmp_path / "labs.tsv")
    with pytest.raises(InputError, match="two tables are called labs; keep one"):
        load(tmp_path)


def test_categories_are_those_of_the_training_rows_alone():
    t = tables()
    t["demo"].loc[t["out"]["part"] == "validation", "from"] = "boat"
    found = MultimodalDataset.from_frames(t, **ROLES)
    assert found.feature_names["demo"] == ["age", "from=clinic", "from=home", "from=ward", "from=other", "smokes"]


def test_presence_ids_and_the_policy_for_gaps_that_are_given():
    x, here = np.random.default_rng(0).normal(size=(90, 2)), np.arange(90) % 4 > 0
    arrays, y, ids = {"x": x, "z": x}, np.array(["u", "v"] * 45), [f"p{n}" for n in range(90)]
    found = MultimodalDataset.from_arrays(arrays, y, id=ids, present={"x": here})
    assert found.present.tolist() == np.column_stack([here, np.ones(90, bool)]).tolist()
    assert found.row_names == ids
    names = [
        MultimodalDataset.from_frames(tables(), **ROLES, nan_policy=p).feature_names["labs"]
        for p in ("indicator", "mean")
    ]
    assert names == [["na", "k", "k measured"], ["na", "k"]]
    with pytest.raises(InputError, match="NaN"):
        MultimodalDataset.from_frames(tables(), **ROLES, nan_policy="error")


def test_names_of_data_and_of_columns():
    t = tables()
    assert [MultimodalDataset.from_frames(t, **ROLES, **more).name for more in ({}, {"name": "mine"})] == [
        "frames",
        "mine",
    ]
    x, y = {"x": np.random.default_rng(0).normal(size=(90, 2))}, np.array(["u", "v"] * 45)
    assert MultimodalDataset.from_arrays(x, y, names={"x": ["p", "q"]}).feature_names == {"x": ["p", "q"]}
    for names in (["p", "p"], ["p"], ["p", "q", "r"]):
        with pytest.raises(InputError, match="modality 'x' has 2 columns; give each a name of its own"):
            MultimodalDataset.from_arrays(x, y, names={"x": names})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = tmp_path_factory.mktemp("tables")
    path = write(whole(tables()), folder / "one.csv")
    (folder / "one.toml").write_text(MAP)
    config = TrainConfig.preset("vanilla", epochs=3, unimodal_share=0.0, rates=())
    train(load(path), config, seed=0, run_dir=folder / "run")
    return load_run(folder / "run")


def test_new_tables_of_any_layout_are_predicted_alike(finished: LoadedRun, tmp_path: Path):
    t = tables(1, 40)
    one = whole(t).drop(columns=["died", "part"])
    wanted = finished.predict(one)
    path = write(one[one.columns[::-1]].sample(frac=1, random_state=0), tmp_path / "new.csv")
    for data in (path, str(write(one, tmp_path / "new.parquet")), {"labs": t["labs"], "demo": t["demo"]}):
        found = finished.predict(data)
        assert found.rows == wanted.rows
        torch.testing.assert_close(found.answers, wanted.answers, rtol=1e-5, atol=1e-6)
    arrays = {"labs": t["labs"].set_index("patient").reindex(t["demo"]["patient"])[["na", "k"]].to_numpy()}
    found = finished.predict(arrays)  # of one modality, in the order of training
    alone = finished.predict(one.drop(columns=["age", "from", "smokes"]))
    torch.testing.assert_close(found.answers, alone.answers, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"give arrays of numbers \[N, d\] with one N"):
        finished.predict(arrays | {"demo": arrays["labs"][:5]})
    with pytest.raises(InputError, match="arrays hold no labels; use predict"):
        load(arrays, preprocessing=finished.preprocessing)
    table = wanted.table()
    assert set(table["prediction"]) <= {"no", "yes"}
    np.testing.assert_allclose(table["p_no"] + table["p_yes"], 1.0, rtol=1e-5)


def test_new_values_and_columns_are_told_and_rows_stay_independent(finished: LoadedRun):
    one = whole(tables(1, 40)).drop(columns=["died", "part", "na"]).assign(extra=1.0)
    one.loc[5, "from"] = "boat"  # where "helicopter" was
    found = finished.predict(one)
    assert found.differences["unknown_categories"]["demo"] == ["from=boat", "from=ship"]
    assert found.differences["missing_columns"] == {"labs": ["na"]}
    assert "extra" in str(found.differences["new_columns"])
    alone = finished.predict(one.iloc[[7]])
    torch.testing.assert_close(alone.answers[0], found.answers[7], rtol=0, atol=1e-6)


def test_a_new_row_without_any_value_gets_the_class_shares_of_training(finished: LoadedRun):
    one = whole(tables(1, 40)).drop(columns=["died", "part"]).astype(object)
    one.loc[9, ["age", "from", "smokes", "na", "k"]] = None
    found = finished.predict(one)
    assert found.present[9].tolist() == [False, False]
    torch.testing.assert_close(found.answers[9], torch.tensor([0.5, 0.5]))  # every other training row died
    assert (found.answers[:9] - 0.5).abs().min() > 0


def test_class_codes_that_are_numbers_do_not_depend_on_gaps_elsewhere(tmp_path: Path):
    one = whole(tables()).assign(ward=np.arange(ROWS) % 3 + 1)
    roles = ROLES | {"modalities": {"labs": ["na", "k"], "demo": ["ward"]}, "categorical": ["ward"]}
    data = MultimodalDataset.from_frames(one, **roles)
    assert data.feature_names["demo"] == ["ward=1", "ward=2", "ward=3", "ward=other"]
    new = one.assign(ward=one["ward"].astype(float).where(one.index > 0))  # a gap makes pandas store 2 as 2.0
    again = load(new, preprocessing=data.preprocessing)
    assert torch.equal(again.features["demo"][1:], data.features["demo"][1:])


def test_a_split_can_be_drawn_for_scoring_a_table_or_a_folder(finished: LoadedRun, tmp_path: Path):
    known = finished.preprocessing  # of tables with a column for the split
    t = tables(1)
    (tmp_path / "several").mkdir()
    for name, frame in t.items():
        write(frame.drop(columns="part", errors="ignore"), tmp_path / "several" / f"{name}.csv")
    for path in (tmp_path / "several", write(whole(t).drop(columns="part"), tmp_path / "one.csv")):
        plain = load(path, preprocessing=known)
        drawn = [load(path, preprocessing=known, split_seed=seed).split for seed in (0, 0, 1)]
        assert plain.split.unique().tolist() == [2]
        assert np.bincount(drawn[0]).tolist() == [96, 16, 48]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(InputError, match="column 'part' holds the split; leave split_seed out"):
        load(write(whole(t), tmp_path / "with.csv"), preprocessing=known, split_seed=0)


def test_roles_that_are_given_win_over_those_of_the_run(finished: LoadedRun, tmp_path: Path):
    one = whole(tables(1, 40))
    wanted = load(one, preprocessing=finished.preprocessing)
    path = write(one.rename(columns={"died": "dead"}), tmp_path / "one.csv")
    found = load(path, preprocessing=finished.preprocessing, columns={"label": "dead"})
    assert torch.equal(found.labels, wanted.labels)


def test_a_label_that_training_did_not_have_is_refused_when_scoring(finished: LoadedRun):
    one = whole(tables(1, 40))
    one.loc[4, "died"] = "maybe"
    with pytest.raises(InputError, match=r"Unknown class in column 'died', row 4 .*'maybe'"):
        load(one, preprocessing=finished.preprocessing)
