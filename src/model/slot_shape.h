/* Slots that a model's experts are read into when not all of them are held. A slot holds one expert's three matrices, each
 * with room at both ends for reads of whole blocks (O_DIRECT). Layers whose experts take equally many bytes share the slots of
 * one class: no byte is lost to a larger type elsewhere in the file, and nothing can fragment. Pure arithmetic: the planner
 * counts with it, the store lays out with it. */
#ifndef FERRY_MODEL_SLOT_SHAPE_H
#define FERRY_MODEL_SLOT_SHAPE_H

#include <stdint.h>

#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

struct slot_class {
    uint64_t slot_bytes;    /* whole blocks */
    int n_layers, n_used;   /* n_used: most experts of a layer that one token needs */
    int n_experts, n_slots; /* of all its layers; experts that need slots */
};

struct slot_shape {
    struct slot_class *classes; /* own: (n_classes) */
    int n_classes;
    int *class_of; /* own: (n_layer) -1: a layer without experts that need slots */
    int n_experts, n_slots;
    uint64_t bytes; /* of all slots */
};

/* Slots for all experts but n_away[layer] (n_layer; NULL: none) of each layer, which are held elsewhere, whichever they are. Where
 * ram_bytes are enough, experts held elsewhere have slots, too, but for layers that are so whole: experts change places then without
 * being read again.
 * Share ram_bytes among the classes, each by the bytes of its experts, none above what its experts fill. Every class gets at
 * least what one token needs of a layer; ram_bytes 0 means just that. ERR_NOMEM; ERR_LIMIT, with the numbers, when ram_bytes
 * are too few. A model without experts has no classes. On failure there is nothing to be done with *out. */
int slot_shape_init(const struct model *m, const int *n_away, uint64_t ram_bytes, struct slot_shape *out);
void slot_shape_done(struct slot_shape *s);

/* Room for a matrix of so many bytes wherever it begins in its file. */
uint64_t slot_shape_matrix_bytes(uint64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
