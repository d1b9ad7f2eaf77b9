import pytest
from served import served


@pytest.fixture(scope="session")
def plm(tiny_plm):
    plm = tiny_plm()
    # The first use tries short cuts; every test then finds them tried.
    list(plm.represent([[1, 5, 6], [1, 5, 7, 8]], [1, 1]))
    list(plm.predict([[1, 5, 6], [1, 5, 7, 8]], [2, 2]))
    return plm


@pytest.fixture
def client(plm):
    with served(plm) as client:
        yield client
