import numpy as np

from chestct.imaging.statistics import holm


def test_holm_agrees_with_the_worked_example_of_the_method() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.zeros(0)).shape == (0,)
