"""Smaller clouds by gpuhunt, with its own files of 2026 from a server on loopback."""

from __future__ import annotations

import gc
import io
import warnings
import zipfile
from datetime import date
from typing import Any

import pytest

from forge.errors import ClusterError
from forge.pricing.fetch.gpuhunt_library import fetch_gpuhunt
from forge.pricing.offer import Offer
from tests.support.price_server import Answer, serve_prices

gpuhunt = pytest.importorskip("gpuhunt")

TODAY = date(2026, 11, 28)
HEADER = (
    "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size,gpu_vendor,flags,cpu_arch,"
    "provider_data"
)
CATALOGS = {
    "lambdalabs": """gpu_8x_h100_sxm5,us-west-3,23.92,208,1800.0,8,H100,80.0,False,22000.0,nvidia,,x86,{}
gpu_1x_gh200,us-east-3,1.49,64,432.0,1,GH200,96.0,False,4096.0,nvidia,,arm,{}
cpu_4x_general,us-east-1,0.2,4,16.0,0,,,False,,,,x86,{}
gpu_1x_a10,us-east-1,not-a-price,30,200.0,1,A10,24.0,False,1400.0,nvidia,,x86,{}""",
    "runpod": """NVIDIA A100 80GB PCIe,EU-RO-1,1.64,8,117.0,1,A100,80.0,False,,nvidia,,x86,{}
NVIDIA A100 80GB PCIe,EU-RO-1,1.04,8,117.0,1,A100,80.0,True,,nvidia,,x86,{}
NVIDIA A100 80GB PCIe,EU-RO-1,1.84,8,117.0,1,A100,80.0,False,,nvidia,,x86,{}
NVIDIA GeForce RTX 4090,EU-CZ-1,0.34,8,40.0,1,RTX4090,24.0,False,,nvidia,,x86,{}
AMD Instinct MI300X OAM,EU-RO-1,2.49,24,283.0,1,MI300X,192.0,False,,amd,,x86,{}""",
    "gcp": """a3-highgpu-8g,us-central1-a,88.49,208,1872.0,8,H100,80.0,False,,nvidia,,x86,{}
a3-highgpu-8g,us-central1-a,88.49,208,1872.0,8,H100,80.0,True,,nvidia,,x86,{}
a2-highgpu-1g,us-central1-a,3.67,12,85.0,1,A100,40.0,False,,nvidia,,x86,{}
a3-highgpu-8g,us-central1-b,20.0,208,1872.0,8,H100,80.0,False,,nvidia,,x86,"{""is_dws_calendar_mode"": true}\"""",
    "azure": "Standard_NC40ads_H100_v5,eastus,6.98,40,320.0,1,H100NVL,94.0,False,,nvidia,,x86,{}",
}


def reply(path: str, *_: Any) -> Answer:
    provider, _, name = path.strip("/").partition("/")
    if provider not in CATALOGS:
        return 404, {}, b""
    if name == "version":
        return 200, {}, b"20261127-12"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"{provider}.csv", f"{HEADER}\n{CATALOGS[provider]}\n")
    return 200, {"Content-Type": "application/zip"}, content.getvalue()


@pytest.fixture(scope="module")
def fetched() -> Any:
    with serve_prices(reply) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUHUNT_CATALOG_URL", server.url)
        catalog = gpuhunt.Catalog(balance_resources=False)
        found = fetch_gpuhunt(TODAY, catalog=catalog)
        with warnings.catch_warnings(action="ignore"):
            gc.collect()  # gpuhunt leaves its connections to the garbage collector
        return found


def only(fetched: Any, **keys: Any) -> Offer:
    (found,) = [one for one in fetched.offers if all(getattr(one, key) == value for key, value in keys.items())]
    return found


def test_fetch__small_clouds__prices_and_names_of_gpus(fetched: Any) -> None:
    h100 = only(fetched, cloud="lambdalabs")
    assert (h100.gpu, h100.num_gpus, h100.usd_per_hour, h100.spot_usd_per_hour) == ("H100-80GB", 8, 23.92, None)
    assert (h100.region, h100.zone, h100.inter_node_gbps, h100.observed) == ("us-west-3", None, None, TODAY)
    a100 = only(fetched, cloud="runpod", gpu="A100-80GB")
    assert (a100.usd_per_hour, a100.spot_usd_per_hour) == (1.64, 1.04), "the cheaper of two on-demand prices"
    assert only(fetched, cloud="runpod", gpu="RTX-4090").gpu_memory_gib == 24
    assert only(fetched, cloud="azure").gpu == "H100-NVL"


def test_fetch__gcp__location_is_a_zone_and_equal_spot_is_none(fetched: Any) -> None:
    h100 = only(fetched, cloud="gcp", gpu="H100-80GB")
    assert (h100.region, h100.zone, h100.spot_usd_per_hour) == ("us-central1", "us-central1-a", None)
    assert (h100.inter_node_gbps, only(fetched, cloud="gcp", num_gpus=1).gpu) == (800, "A100-40GB")


def test_fetch__what_is_left_out__is_said(fetched: Any) -> None:
    assert not [one for one in fetched.offers if one.gpu in ("GH200", "MI300X") or not one.num_gpus]
    assert "3 offers were left out: not NVIDIA's, with ARM CPUs, or for reservation only" in fetched.notes
    assert any("Failed to load aws catalog" in note for note in fetched.notes)
    assert any("Skipping malformed row in lambdalabs" in note for note in fetched.notes)


def test_fetch__no_network__says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_prices(reply) as server:
        monkeypatch.setenv("GPUHUNT_CATALOG_URL", server.url)
    with pytest.raises(ClusterError, match="gpuhunt failed: Failed to load catalogs of all providers"):
        fetch_gpuhunt(TODAY, catalog=gpuhunt.Catalog())
