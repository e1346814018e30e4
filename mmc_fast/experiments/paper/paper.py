"""The numbers that the paper prints (Chaudhuri et al., ICML 2025), as facts to stand beside ours, each written once.

Tables 1 and 2: mortality AUC (ROC), AUC (precision-recall); readmission AUC (ROC), AUC (precision-recall). Tables 3 and 4:
accuracy in percent with audio missing in 95, 90, 85, 80 %. Table 5: mortality AUC (ROC), AUC (precision-recall).
Table 6: mortality AUC (ROC) by what is put in the place of a missing modality. Table 7: variance inflation with 2, 3, 4, 5
modalities. Table 9: cross-entropy of the weight classifier. Table 11: rank at β = 0, 2, 4, 6, 8, by base model.
"""

from __future__ import annotations

__all__ = ["TABLE1", "TABLE2", "TABLE3", "TABLE4", "TABLE5", "TABLE6", "TABLE7", "TABLE9", "TABLE11"]

Four = tuple[float, float, float, float]


TABLE1: dict[str, Four] = {
    "cm-ae": (0.7873, 0.3620, 0.6007, 0.3355),
    "smil": (0.7981, 0.3536, 0.6155, 0.3279),
    "mt": (0.8176, 0.3467, 0.6278, 0.2959),
    "grape": (0.7657, 0.3733, 0.6335, 0.3120),
    "m3care": (0.8265, 0.3830, 0.6020, 0.3870),
    "shaspec": (0.8100, 0.3630, 0.6216, 0.3549),
    "muse": (0.8236, 0.3987, 0.6781, 0.4185),
    "ebr": (0.8533, 0.4277, 0.7030, 0.4290),
}
TABLE2: dict[str, Four] = {
    "grape": (0.8837, 0.4584, 0.7085, 0.4551),
    "grape+kd": (0.9011, 0.4620, 0.7231, 0.4610),
    "grape+ebr": (0.9102, 0.4799, 0.7488, 0.4691),
    "m3care": (0.8896, 0.4603, 0.7067, 0.4532),
    "m3care+kd": (0.8950, 0.4700, 0.7080, 0.4562),
    "m3care+ebr": (0.8987, 0.4850, 0.7296, 0.4832),
    "muse": (0.9201, 0.4883, 0.7351, 0.4985),
    "muse+kd": (0.9350, 0.4993, 0.7402, 0.5066),
    "muse+ebr": (0.9380, 0.5001, 0.7597, 0.5138),
}
TABLE3: dict[str, Four] = {
    "ae": (89.78, 89.33, 89.78, 88.89),
    "gan": (89.11, 89.78, 91.11, 93.11),
    "full2miss": (90.00, 91.11, 92.23, 92.67),
    "grape": (89.65, 90.42, 91.15, 91.37),
    "smil": (92.89, 93.11, 93.33, 94.44),
    "shaspec": (93.33, 93.56, 93.78, 94.67),
    "muse": (94.21, 94.36, 94.82, 94.93),
    "ebr": (95.30, 95.57, 95.89, 95.93),
}
TABLE4: dict[str, Four] = {
    "smil+ebr": (93.77, 94.02, 94.51, 94.96),
    "shaspec+ebr": TABLE3["ebr"],
    "muse+ebr": (95.02, 95.26, 95.61, 95.70),
}
TABLE5: dict[str, tuple[float, float]] = {
    "kd-strongest": (0.9196, 0.4875),
    "kd-strongest-first": (0.8651, 0.4130),
    "kd-random": (0.9005, 0.4685),
    "kd-simultaneous": (0.9102, 0.4786),
    "kd": (0.9350, 0.4993),
}
TABLE6: dict[str, float] = {
    "zeros": 0.5110,
    "random": 0.6139,
    "nearest neighbour": 0.7150,
    "late fusion": 0.6990,
    "mean without class": 0.5312,
    "mean with class": 0.7396,
    "ebr": 0.7829,
    "target": 0.7844,
}
TABLE7: dict[str, Four] = {
    "vanilla": (1.15, 2.68, 3.51, 4.70),
    "kd": (1.09, 1.90, 2.30, 2.68),
    "ebr": (1.05, 1.26, 1.32, 1.55),
}
TABLE9: dict[str, float] = {"vanilla": 5.66, "kd": 2.09, "ebr": 0.59}
TABLE11: dict[str, dict[str, tuple[int, int, int, int, int]]] = {
    "mmvae": {
        "vanilla": (477, 421, 398, 110, 96),
        "kd": (482, 465, 390, 298, 270),
        "ebr": (485, 477, 431, 405, 395),
    },
    "gmc": {
        "vanilla": (1877, 1330, 1146, 930, 872),
        "kd": (1905, 1676, 1533, 1427, 1390),
        "ebr": (1912, 1825, 1709, 1600, 1588),
    },
}
