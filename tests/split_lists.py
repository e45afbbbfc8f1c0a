"""Small folders of split lists, one of each known kind, as text by file name."""

from __future__ import annotations

from pathlib import Path

UCF101 = {
    "classInd.txt": "1 Zumba\n2 Archery\n",
    "trainlist01.txt": (
        "Zumba/v_Zumba_g02_c01.avi 1\nZumba/v_Zumba_g02_c02.avi 1\nArchery/v_Archery_g02_c01.avi 2\n"
    ),
    "testlist01.txt": "Zumba/v_Zumba_g01_c01.avi\nArchery/v_Archery_g01_c01.avi\n",
    "trainlist02.txt": "Zumba/v_Zumba_g01_c01.avi 1\nArchery/v_Archery_g01_c01.avi 2\n",
    "testlist02.txt": "Zumba/v_Zumba_g02_c01.avi\nZumba/v_Zumba_g02_c02.avi\nArchery/v_Archery_g02_c01.avi\n",
}
HMDB51 = {
    "wave_test_split1.txt": "a(1)!#&+;=[x]_wave_u.avi 1\nb_wave_u.avi 2\nc_wave_u.avi 0\n",
    "wave_test_split2.txt": "a(1)!#&+;=[x]_wave_u.avi 2\nb_wave_u.avi 1\nc_wave_u.avi 0\n",
    "brush_hair_test_split1.txt": "a_brush_hair.avi 1 \nb_brush_hair.avi 2 \n",
    "brush_hair_test_split2.txt": "a_brush_hair.avi 0 \nb_brush_hair.avi 1 \n",
}
TWO_STREAM = {
    "train_rgb_split1.txt": "v_Zumba_g02_c01 119 0\nv_Zumba_g02_c02 7 0\nv_ArcHery_g02_c01 20 1\n",
    "val_rgb_split1.txt": "v_Zumba_g01_c01 30 0\nv_ArcHery_g01_c01 31 1\n",
    "train_flow_split1.txt": "v_Zumba_g02_c01 118 0\nv_Zumba_g02_c02 6 0\nv_ArcHery_g02_c01 19 1\n",
    "val_flow_split1.txt": "v_Zumba_g01_c01 29 0\nv_ArcHery_g01_c01 30 1\n",
}
LABELLED = {
    "hmdb51_train.txt": "wave/a b.avi 1\nwave/-c.avi 1\nbrush hair/é'\".avi 2\n",
    "hmdb51_test.txt": "wave/d.avi 1\nbrush hair/e.avi 2\n",
    "hmdb51_val.txt": "wave/f.avi 1\n",
}
COUNTED = {
    "own_train.txt": "wave/a 119 0\nbrush/a 20 1\n",
    "own_test.txt": "wave/b 30 0\nbrush/b 31 1\n",
}
KINDS = {
    "ucf101": UCF101,
    "hmdb51": HMDB51,
    "two-stream": TWO_STREAM,
    "labelled": LABELLED,
    "counted": COUNTED,
}


def write_lists(folder: Path, lists: dict[str, str]) -> Path:
    """Writes the files and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (folder / name).write_bytes(text.encode())
    return folder


def touch(root: Path, *names: str) -> Path:
    """Makes files of one byte; a name that ends in / becomes a folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(b"x")
    return root
