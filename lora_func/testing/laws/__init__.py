"""The laws, one function each; the docstring of a law states it as mathematics.

``W`` is a frozen weight with its bias ``b``, ``p`` the leaves of an adapter, ``x`` activations.
Files here are named by what their laws are about.
"""

from lora_func.testing.laws._claims import (
    apply_takes_a_stack,
    bounds_keep_what_is_inside_of_them,
    change_is_linear_around_the_neutral_leaves,
    factors_multiply_to_the_change,
    leaves_have_the_axes_that_they_name,
    no_matrix_of_the_size_of_the_weight_is_built,
    norm_is_that_of_the_change,
    products_with_x_are_all_that_apply_needs,
)
from lora_func.testing.laws._files import files_keep_every_bit, peft_computes_the_same
from lora_func.testing.laws._gradients import (
    directional_derivative_is_the_gradient,
    double_backward_is_the_derivative_of_the_gradient,
    each_leaf_gets_a_gradient,
    float32_leaves_learn_on_a_half_precision_layer,
    gradients_are_those_of_finite_differences,
    zero_rows_stay_finite,
)
from lora_func.testing.laws._prepared import (
    prepared_leaves_give_the_same,
    prepared_leaves_leave_the_start,
    prepared_stack_gives_the_same,
)
from lora_func.testing.laws._purity import (
    apply_is_a_function,
    init_depends_on_seed_site_and_config_alone,
    nothing_that_goes_in_is_written_to,
    one_graph_serves_every_adapter,
    randomness_comes_from_the_seed,
)
from lora_func.testing.laws._stacks import (
    mixed_ranks_train_like_their_members_or_are_refused,
    stack_is_refused_where_one_adapter_is_wanted,
    unstack_undoes_stack,
    vmap_over_a_stack_is_the_loop,
)
from lora_func.testing.laws._start import (
    autocast_keeps_start_and_dtype,
    first_step_follows_the_learning_rate,
    start_is_the_base,
)
from lora_func.testing.laws._views import (
    any_batch_shape_is_the_same_rows,
    bare_weight_is_a_layer_without_bias,
    gradients_are_those_of_the_weight_view,
    layer_is_affine_in_x,
    output_has_the_dtype_of_the_layer,
    parametrized_layer_is_the_same,
    weight_view_is_the_activation_view,
)

LAWS = (
    leaves_have_the_axes_that_they_name,
    start_is_the_base,
    autocast_keeps_start_and_dtype,
    first_step_follows_the_learning_rate,
    weight_view_is_the_activation_view,
    output_has_the_dtype_of_the_layer,
    parametrized_layer_is_the_same,
    bare_weight_is_a_layer_without_bias,
    layer_is_affine_in_x,
    any_batch_shape_is_the_same_rows,
    gradients_are_those_of_the_weight_view,
    each_leaf_gets_a_gradient,
    gradients_are_those_of_finite_differences,
    directional_derivative_is_the_gradient,
    double_backward_is_the_derivative_of_the_gradient,
    float32_leaves_learn_on_a_half_precision_layer,
    zero_rows_stay_finite,
    apply_is_a_function,
    nothing_that_goes_in_is_written_to,
    randomness_comes_from_the_seed,
    init_depends_on_seed_site_and_config_alone,
    one_graph_serves_every_adapter,
    vmap_over_a_stack_is_the_loop,
    stack_is_refused_where_one_adapter_is_wanted,
    unstack_undoes_stack,
    mixed_ranks_train_like_their_members_or_are_refused,
    apply_takes_a_stack,
    products_with_x_are_all_that_apply_needs,
    norm_is_that_of_the_change,
    factors_multiply_to_the_change,
    change_is_linear_around_the_neutral_leaves,
    bounds_keep_what_is_inside_of_them,
    no_matrix_of_the_size_of_the_weight_is_built,
    prepared_leaves_give_the_same,
    prepared_stack_gives_the_same,
    prepared_leaves_leave_the_start,
    files_keep_every_bit,
    peft_computes_the_same,
)
"""All laws."""

__all__ = [
    "LAWS",
    "any_batch_shape_is_the_same_rows",
    "apply_is_a_function",
    "apply_takes_a_stack",
    "autocast_keeps_start_and_dtype",
    "bare_weight_is_a_layer_without_bias",
    "bounds_keep_what_is_inside_of_them",
    "change_is_linear_around_the_neutral_leaves",
    "directional_derivative_is_the_gradient",
    "double_backward_is_the_derivative_of_the_gradient",
    "each_leaf_gets_a_gradient",
    "factors_multiply_to_the_change",
    "files_keep_every_bit",
    "first_step_follows_the_learning_rate",
    "float32_leaves_learn_on_a_half_precision_layer",
    "gradients_are_those_of_finite_differences",
    "gradients_are_those_of_the_weight_view",
    "init_depends_on_seed_site_and_config_alone",
    "layer_is_affine_in_x",
    "leaves_have_the_axes_that_they_name",
    "mixed_ranks_train_like_their_members_or_are_refused",
    "no_matrix_of_the_size_of_the_weight_is_built",
    "norm_is_that_of_the_change",
    "nothing_that_goes_in_is_written_to",
    "one_graph_serves_every_adapter",
    "output_has_the_dtype_of_the_layer",
    "parametrized_layer_is_the_same",
    "peft_computes_the_same",
    "prepared_leaves_give_the_same",
    "prepared_leaves_leave_the_start",
    "prepared_stack_gives_the_same",
    "products_with_x_are_all_that_apply_needs",
    "randomness_comes_from_the_seed",
    "stack_is_refused_where_one_adapter_is_wanted",
    "start_is_the_base",
    "unstack_undoes_stack",
    "vmap_over_a_stack_is_the_loop",
    "weight_view_is_the_activation_view",
    "zero_rows_stay_finite",
]
