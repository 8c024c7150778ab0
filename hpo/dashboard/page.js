// Runs before optuna-dashboard's own script: shows why a request was refused where its pages do not.
(() => {
  const fetchAsIs = window.fetch;
  const silent = /^\/api\/studies(\/\d+(\/rename)?)?$/; // its pages show no reason for these

  const show = (reason) => {
    const element = document.getElementById("hpo-refusal");
    element.textContent = reason;
    element.hidden = false;
    setTimeout(() => { element.hidden = true; }, 10000);
  };

  window.fetch = async (address, options) => {
    const response = await fetchAsIs(address, options);
    if (response.status === 401) {
      location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
    } else if (!response.ok && options?.method && silent.test(address)) {
      response.clone().json().then(({ reason }) => show(reason), () => {});
    }
    return response;
  };
})();
