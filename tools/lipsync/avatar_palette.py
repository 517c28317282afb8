"""The avatar's colours, shared by its drawing and by the constructed mouth model."""

from __future__ import annotations

from lipsync.avatar_drawing import colour

SKIN = colour("f2c3a1")
SKIN_LIGHT = colour("fddcc0")
SKIN_SHADE = colour("dc9c7c")
SKIN_DEEP = colour("b96f56")
SKIN_SHINE = colour("fff0e0")
BLUSH = colour("ee8f7c")
NOSTRIL = colour("7c3f35")
HAIR = colour("4b2b28")
HAIR_DEEP = colour("2e191b")
HAIR_LIGHT = colour("9a5f45")
GOLD = colour("e9b95c")

JACKET = colour("1f6f78")
JACKET_DEEP = colour("124951")
JACKET_LIGHT = colour("38929a")
BLOUSE = colour("fbf1e4")
BLOUSE_SHADE = colour("dcc4b2")

EYE_WHITE = colour("fdfaf6")
EYE_SHADE = colour("d9cfd0")
EYE_CORNER = colour("e8a89a")
IRIS_RIM = colour("23443f")
IRIS = colour("3f8072")
IRIS_LIGHT = colour("8fc9a6")
PUPIL = colour("12191b")
LASH = colour("2a1717")
LASH_LOWER = colour("6d4038")
LID_SHADOW = colour("5a3a3c")
WHITE = colour("ffffff")

# The lips alone are redder than 0.52 of red over green: the mouth model finds them by that.
LIP_UPPER = colour("bf5450")
LIP_LOWER = colour("d66a62")
LIP_LINE = colour("7d2f30")
LIP_SHINE = colour("ffc4b4")
LIP_RIDGE = colour("f7b09c")
CAVITY = colour("4a1519")
CAVITY_DEEP = colour("2c0b10")
TEETH = colour("fbf4ea")
TONGUE = colour("c9605e")
