"""What published and larger sizes need of TPUs, planned without one."""
