"""The reading of compiled programs that other tests rely on."""

import pytest
from compiled import groups, over


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", {(0, 1), (2, 3)}),
        ("[2,2]<=[4]", {(0, 1), (2, 3)}),
        ("[2,2]<=[2,2]T(1,0)", {(0, 2), (1, 3)}),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", {(0, 1), (2, 3)}),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", {(0, 2), (1, 3)}),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", {(0, 1, 2, 3)}),
        ("mesh['axis_0'=3,'axis_1'=2], device_ids=([2,3]T(1,0)) {'axis_0'}", {(0, 1, 2), (3, 4, 5)}),
    ],
)
def test_groups_are_read_right(text, expected):
    assert groups(text) == expected


def test_axes_have_their_names():
    assert over({(0, 1, 2), (3, 4, 5)}, 2, 3) == "latent"
    assert over({(0, 3), (1, 4), (2, 5)}, 2, 3) == "data"
    assert over({(0, 1, 2, 3, 4, 5)}, 2, 3) == "both"
    with pytest.raises(KeyError):
        over({(0, 1), (2, 3), (4, 5)}, 2, 3)
