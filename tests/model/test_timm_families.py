"""A small network of nearly every family of timm's as an image tower: one vector of its width each."""

import pytest
import timm
import torch
from tiny_model import image_section

from clipcluster.errors import UserError
from clipcluster.model.hugging_face import refusing
from clipcluster.model.towers import build_image_tower

SIZE = 96
TOWERS = """
test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext cpubone_nano csatv2
darknet17 cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small
efficientformerv2_s0 tinynet_e efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 test_mambaout test_coatnet caformer_s18 gmlp_ti16_224 mobilenetv3_small_050
mobilevit_xxs mvitv2_tiny nest_tiny
nextvit_small test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s
shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny
test_vit vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224 vovnet39a
legacy_xception xception41p xcit_nano_12_p8_224 resnet50_clip vit_tiny_patch16_224
"""
# What these cannot take is images of this size: halos of 8, two branches for 240, positions for 224 alone.
REFUSED = ("halonet_h1", "crossvit_tiny_240", "efficientformer_l1")


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_every_family_is_a_tower() -> None:
    torch.manual_seed(0)
    for name in filter(timm.is_model, TOWERS.split()):
        tower = build_image_tower(image_section(name), image_size=SIZE)[0].eval()
        with torch.no_grad():
            features = tower(torch.randn(1, 3, SIZE, SIZE))
        assert features.shape == (1, tower.width), name
        assert features.isfinite().all(), name


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_a_size_that_a_tower_cannot_take(name: str) -> None:
    with pytest.raises(UserError, match=name), refusing(name):
        build_image_tower(image_section(name), image_size=SIZE)[0](torch.randn(2, 3, SIZE, SIZE))
